"""Writing state dicts in the names of EDM's classes: the tensors, and the config that reading them restores."""

import dataclasses
from pathlib import Path

import numpy as np

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import edm_names
from cm_jax.conversion.edm import config_of_shapes, negated_head
from cm_jax.conversion.rules import source_shapes, to_source
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    LogSigmaPreconditioning,
    TrigFlowPreconditioning,
)
from cm_jax.errors import InputError
from cm_jax.networks import AnyNetwork, BuiltInNetwork, EDM2UNet, SongUNet
from cm_jax.types import Params, leaves, nested

_NO_EFFECT = {"dropout", "dropout_size", "precision", "attention", "rematerialize", "fourier_scale"}
"""Settings of networks that do not change the function of given parameters."""
_IN_LAYERS = {
    *("channel_mult", "attention_factors", "head_dim", "heads", "variant", "noise_channels", "embedding_channels"),
    *("output_channels", "label_embedding", "pyramid", "resampling"),
}
"""Settings that `_layers` shows."""


def write_state_dict(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a network in the names of EDM's classes, with the prefix "model." or "unet.".

    A class-embedding table becomes EDM's linear layer, the same function up to rounding. Raises InputError for a
    network that this family does not have.
    """
    network, params = _with_linear_labels(config.network), _as_linear_labels(config.network, params)
    rules = edm_names.rules(network)
    params = negated_head(params) if isinstance(config.preconditioning, TrigFlowPreconditioning) else params
    prefix = "unet." if isinstance(network, EDM2UNet) else "model."
    tensors = to_source(rules, params) | edm_names.buffers(network)  # type: ignore[arg-type]  # `rules` refuses others
    return {name if name.startswith("logvar") else prefix + name: tensor for name, tensor in tensors.items()}


def config_as_read(config: ModelConfig, preconditioning: str) -> ModelConfig:
    """The config that reading the written state dict gives with this `--preconditioning` and the right `--head-dim`.

    Raises InputError where the function is another one, whatever the noise range and sigma_data given in reading.
    """
    network = _with_linear_labels(config.network)
    rules = edm_names.rules(network)
    assert isinstance(network, BuiltInNetwork)
    shapes = source_shapes(rules, network.shapes())
    shapes |= {name: array.shape for name, array in edm_names.buffers(network).items()}
    found = config_of_shapes(Path("The file"), shapes, head_dim(network), preconditioning)
    current, restored = config.preconditioning, found.preconditioning
    names = [field.name for field in dataclasses.fields(network) if field.name not in _NO_EFFECT | _IN_LAYERS]
    lost = [
        f"{name}={value!r}" for name in names if (value := getattr(network, name)) != getattr(found.network, name, None)
    ]
    if not lost and _layers(network) != _layers(found.network):  # type: ignore[arg-type]
        lost.append("heads or output channels as here")
    if type(current) is not type(restored):
        lost.append(f"{type(current).__name__} (read as {type(restored).__name__})")
    elif isinstance(current, LogSigmaPreconditioning) and current.time_factor != restored.time_factor:  # type: ignore[union-attr]
        ratio = "arctan(sigma / sigma_data)" if isinstance(current, TrigFlowPreconditioning) else "ln sigma"
        always = 1 if isinstance(current, TrigFlowPreconditioning) else EDM_TIME
        lost.append(f"c_noise = {current.time_factor:g} {ratio} (it is always {always:g} {ratio})")
    if lost:
        raise InputError(f"The edm format cannot represent {' nor '.join(lost)}; use --to native.")
    return found


def _with_linear_labels(network: AnyNetwork) -> AnyNetwork:
    """The network with EDM's layer for labels in place of a class-embedding table."""
    table = isinstance(network, SongUNet) and network.classes and network.label_embedding == "table"
    return dataclasses.replace(network, label_embedding="linear") if table else network  # type: ignore[type-var]


def _as_linear_labels(network: AnyNetwork, params: Params) -> Params:
    """The parameters of `_with_linear_labels(network)`: its layer multiplies its kernel by sqrt(classes)."""
    if _with_linear_labels(network) is network:
        return params
    flat = dict(leaves(params))
    table = np.asarray(flat.pop("embedding/table"), np.float32)
    layer = {"kernel": table / np.float32(len(table)) ** 0.5, "bias": np.zeros_like(table[0])}
    return nested(flat | {f"embedding/label/{name}": array for name, array in layer.items()})


def preconditioning_name(config: ModelConfig) -> str:
    """The `--preconditioning` with which a file without its config is read."""
    if not config.distilled:
        return "edm"
    return "consistency" if isinstance(config.preconditioning, ConsistencyPreconditioning) else "edm-consistency"


def head_dim(network: BuiltInNetwork) -> int | None:
    """The `--head-dim` with which the state dict of a network is read; None for SongUNet, which has one head."""
    if isinstance(network, SongUNet) or network.head_dim:
        return getattr(network, "head_dim", None)
    return max(channels // network.heads_for(channels) for channels in _attention_channels(network))


def _layers(network: BuiltInNetwork) -> tuple:
    """The blocks, the numbers of attention heads, the filters, and the shapes of the parameters."""
    heads = [network.heads_for(channels) for channels in _attention_channels(network)]
    filters = [(name, array.tobytes()) for name, array in edm_names.buffers(network).items()]
    return network.plan(), heads, filters, [(path, leaf.shape) for path, leaf in leaves(network.shapes())]


def _attention_channels(network: BuiltInNetwork) -> list[int]:
    units = [unit for block in network.plan().blocks for unit in block.units]
    return [unit.channels_out for unit in units if unit.kind == "attention"]
