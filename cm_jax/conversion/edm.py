"""Checkpoints of the EDM family: EDM, EDM2, ECT, TCM and sCM.

They are pickles (see persistence.py) or state dicts. A pickle names the classes and constructor arguments of its
networks; a state dict leaves the preconditioning to the user.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

from cm_jax.checkpoints.model_config import Latents, ModelConfig
from cm_jax.checkpoints.published import usual_classes
from cm_jax.conversion import edm_names
from cm_jax.conversion.persistence import Record, read_persistent
from cm_jax.conversion.pickles import pickled_array
from cm_jax.conversion.rules import Shapes, Tensors, from_source
from cm_jax.conversion.torch_files import check_bytes
from cm_jax.diffusion.noise_schedule import EDM_TIME, NUM_LEVELS, KarrasSchedule
from cm_jax.diffusion.preconditioning import (
    AnyPreconditioning,
    ConsistencyPreconditioning,
    EDMPreconditioning,
    IDDPMPreconditioning,
    TrigFlowPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from cm_jax.errors import InputError, one_line
from cm_jax.io.atomic import read_errors
from cm_jax.networks import BuiltInNetwork, EDM2UNet, SongUNet
from cm_jax.types import Params, leaves, nested

_PRECONDITIONINGS = (
    *("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "ECMPrecond", "Precond"),
    *("TrigFlowPrecond", "TrigFlowDDPMPPPrecond"),
)
_EDM_DENOISERS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
"""Classes of EDM's code, whose arguments state the rate of label dropout in training."""
_EDM_MODULES = {"Linear", "Conv2d", "GroupNorm", "PositionalEmbedding", "FourierEmbedding", "UNetBlock", "ModuleDict"}
_EDM2_MODULES = {"MPConv", "MPFourier", "PositionalEmbedding", "Block", "ModuleDict", "Linear"}
_NETWORKS = {
    **dict.fromkeys(("SongUNet", "DhariwalUNet", "TrigFlowDDPMPPUNet"), _EDM_MODULES),
    **dict.fromkeys(("UNet", "EDM2UNet", "TrigFlowUNet"), _EDM2_MODULES),
}
"""Known networks, and the modules that they consist of."""
_OPTIONS = {
    *("model_type", "img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data"),
    *("model_channels", "channel_mult", "channel_mult_emb", "channel_mult_noise", "num_blocks", "attn_resolutions"),
    *("dropout", "label_dropout", "dropout_res", "dout_resolutions", "augment_dim", "embedding_type", "encoder_type"),
    *("decoder_type", "resample_filter", "channels_per_head", "segment_conditioning", "label_balance"),
    *("concat_balance", "res_balance", "attn_balance", "clip_act", "beta_d", "beta_min", "epsilon_t"),
    *("M", "C_1", "C_2"),
}
"""Constructor arguments whose effect is known. Any other that is set may change the function."""
_LICENSE = "Weights of EDM, EDM2 and TCM are published for non-commercial use (CC BY-NC-SA 4.0)."


class EDMCheckpoint(NamedTuple):
    """A checkpoint of the EDM family."""

    config: ModelConfig
    params: Params
    tensors: Tensors
    """Its tensors, with buffers, without the prefix of the preconditioning."""
    notes: tuple[str, ...]
    """What the user should know about the file."""
    record: Record | None = None
    """The network as a pickle describes it."""


def read_pickle(path: Path, *, key: str | None = None, preconditioning: str | None = None) -> EDMCheckpoint:
    """A checkpoint from a persistence pickle; nothing in it is executed.

    key: the network to read, by default "ema". preconditioning: consistency, edm or edm-consistency, for a file
    that does not say whether it is a denoiser. Raises InputError for a damaged file and for one of unknown networks.
    """
    content = read_persistent(path)
    outer = _chosen(path, content, key)
    try:
        modules, tensors = outer.modules(), outer.tensors()
    except ValueError as error:
        raise InputError(f"{path} holds no network of the EDM family: {error}.") from error
    check_bytes(path, tensors)
    inner = modules.get("model") or modules.get("unet")
    if outer.kind not in _PRECONDITIONINGS or inner is None or inner.kind not in _NETWORKS:
        raise InputError(
            f"Expected a network of the EDM family in {path} ({', '.join(_NETWORKS)}), got "
            f"{outer.kind}{f' with {inner.kind}' if inner else ''}."
        )
    known = {"", "model", "unet"}
    for name, module in modules.items():
        if name not in known and module.kind not in _NETWORKS[inner.kind]:
            raise InputError(f"Expected the modules of {inner.kind} in {path}, got {module.kind} as {name}.")
    arguments = outer.part("_init_kwargs")
    strange = [f"{name}={one_line(value)}" for name, value in arguments.items() if value and name not in _OPTIONS]
    if strange:
        raise InputError(f"{path} uses options of {inner.kind} that are not supported: {', '.join(strange)[:300]}.")

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if not edm_names.is_edm(shapes):
        raise InputError(f"Expected the tensors of {inner.kind} in {path}, got {len(shapes)} without its first layer.")
    prefix = edm_names.network_prefix(shapes)
    head_dim = _number(path, arguments, "channels_per_head", 64, 1, 4096)
    network = _infer(path, shapes, prefix, head_dim)
    network = _with_attributes(path, network, arguments, inner, modules)
    trained = preconditioning or _kind(content, outer, inner, arguments, tensors)
    data = content.get("dataset_kwargs")
    names = usual_classes(network.classes, path.stem, data.get("path") if isinstance(data, dict) else None)
    config = _config(path, network, outer, trained, names)
    config = dataclasses.replace(config, latents=_latents(path, content))
    if network.classes is not None and outer.kind in _EDM_DENOISERS:
        rate = float(_number(path, arguments, "label_dropout", 0.0, 0.0, 1.0))
        config = dataclasses.replace(config, label_dropout=rate)
    notes = (_LICENSE, _LATENT_NOTE) if config.latents else (_LICENSE,)
    return _finished(path, config, tensors, prefix, notes)._replace(record=outer)


_HEADS_NOTE = "Attention heads are assumed to have 64 channels; tensors do not determine this (--head-dim)."
_LATENT_NOTE = "This model samples latents of an autoencoder, not images: `sample` writes an .npz file for its decoder."


def read_state_dict(
    path: Path, tensors: Tensors, *, head_dim: int | None = None, preconditioning: str | None = None
) -> EDMCheckpoint:
    """A checkpoint from a state dict with the names of this family.

    Raises InputError where `preconditioning` is not given: names and shapes do not determine it.
    """
    prefix = edm_names.network_prefix({name: tensor.shape for name, tensor in tensors.items()})
    if preconditioning is None:
        raise InputError(
            f"{path.name} is a state dict of the EDM family without its preconditioning. Convert it with "
            "--preconditioning edm (a denoiser), consistency (ECT, CMT) or edm-consistency (TCM, and ECT on ImageNet)."
        )
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}
    config = config_of_shapes(path, shapes, head_dim, preconditioning)
    notes = (_LICENSE,) if head_dim or isinstance(config.network, SongUNet) else (_LICENSE, _HEADS_NOTE)
    return _finished(path, config, tensors, prefix, notes)


def config_of_shapes(path: Path, shapes: Shapes, head_dim: int | None, preconditioning: str) -> ModelConfig:
    """The config of a state dict with tensors of these names, without prefix, and shapes."""
    network = edm_names.infer(shapes, str(path), head_dim=head_dim)
    trigflow = getattr(network, "variant", "") == "trigflow" or network.modulation == "normalized"
    lowest = 0.003 if preconditioning == "consistency" else 0.0  # ECT's boundary
    outer = Record("TrigFlowPrecond" if trigflow else "ECMPrecond", {"sigma_data": 0.5, "sigma_min": lowest})
    return _config(path, network, outer, preconditioning, usual_classes(network.classes))


def _chosen(path: Path, content: dict[str, Any], key: str | None) -> Record:
    """The network under this key, by default "ema"."""
    found = content.get(key or "ema")
    if isinstance(found, Record):
        return found
    networks = [name for name, value in content.items() if isinstance(value, Record) and value.part("_modules")]
    raise InputError(
        f"{path} has no network {key or 'ema'}. Choose one of its keys by --key: {', '.join(networks)[:200] or 'none'}."
    )


def _infer(path: Path, shapes: dict[str, tuple[int, ...]], prefix: str, head_dim: int | None) -> BuiltInNetwork:
    return edm_names.infer(
        {name.removeprefix(prefix): shape for name, shape in shapes.items()}, str(path), head_dim=head_dim
    )


def _finished(path: Path, config: ModelConfig, tensors: Tensors, prefix: str, notes: tuple[str, ...]) -> EDMCheckpoint:
    network = config.network
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    stored = {name: tensor for name, tensor in named.items() if not edm_names.is_buffer(name)}
    params = from_source(edm_names.rules(network), network.shapes(), stored, source=str(path))
    if isinstance(config.preconditioning, TrigFlowPreconditioning):
        params = negated_head(params)
    return EDMCheckpoint(config, params, named, notes)


def negated_head(params: Params) -> Params:
    """The same network with outputs of the other sign: TrigFlow's F is minus the output of EDM's conventions."""
    flat = dict(leaves(params))
    names = ["head/gain"] if "head/gain" in flat else ["head/output/kernel", "head/output/bias"]
    return nested(flat | {name: -flat[name] for name in names})


def _with_attributes(
    path: Path, network: BuiltInNetwork, arguments: dict[str, Any], inner: Record, modules: dict[str, Record]
) -> BuiltInNetwork:
    """The network with the settings that shapes do not determine. Raises InputError for unknown numbers of heads."""
    changes: dict[str, Any] = {"dropout": _number(path, arguments, "dropout", 0.0, 0.0, 0.99)}
    blocks = [module.state for module in modules.values() if module.kind in ("Block", "UNetBlock")]
    if isinstance(network, EDM2UNet):
        names = {"res_balance": "residual_balance", "attn_balance": "attention_balance", "clip_act": "clip"}
        for name, field in names.items():
            changes[field] = _number(path, blocks[0], name, getattr(network, field), 0.0, 1e6)
        for field in ("label_balance", "concat_balance"):
            changes[field] = _number(path, inner.state, field, getattr(network, field), 0.0, 1.0)
    sizes = arguments.get("dropout_res", arguments.get("dout_resolutions"))
    if sizes is not None:
        each = sizes if isinstance(sizes, list) and sizes else [sizes]
        changes["dropout_size"] = max(_number(path, {"dropout_res": size}, "dropout_res", 1, 1, 2**13) for size in each)
    network = dataclasses.replace(network, **changes)
    for block in blocks:
        channels, heads = block.get("out_channels"), block.get("num_heads")
        if heads and isinstance(channels, int) and network.heads_for(channels) != heads:
            raise InputError(f"{path} has {one_line(heads)} heads at {channels} channels, which is not supported.")
    return network


def _latents(path: Path, content: dict[str, Any]) -> Latents | None:
    """The latents that the network was trained on; None for images."""
    encoder = content.get("encoder")
    if not isinstance(encoder, Record) or encoder.kind != "StabilityVAEEncoder":
        return None
    with read_errors(path, "pickle of the EDM family"):
        scale, bias = (pickled_array(encoder.state[name]).read().ravel().tolist() for name in ("scale", "bias"))
    name = encoder.state.get("vae_name")
    return Latents(name[:100] if isinstance(name, str) else "", tuple(scale), tuple(bias))


def _number(path: Path, values: dict[str, Any], name: str, default: Any, least: float, most: float) -> Any:
    """A number of the file. Raises InputError for anything else and for values out of range."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InputError(f"Expected {name} from {least:g} to {most:g} in {path}, got {one_line(value)}.")
    return value


def _kind(content: dict[str, Any], outer: Record, inner: Record, arguments: dict[str, Any], tensors: Tensors) -> str:
    """consistency, edm or edm-consistency: which function the network was trained as."""
    loss = content.get("loss_fn")
    loss = loss if isinstance(loss, Record) else Record("")
    if outer.kind == "ECMPrecond":
        of_loss, of_network = set(loss.state or ()), arguments.keys() | set(inner.state or ())
        tcm = of_loss & {"_parameters", "boundary_prob"} or of_network & {"dout_resolutions", "attn_type", "emb_norm"}
        return "edm-consistency" if tcm or inner.kind == "EDM2UNet" else "consistency"
    if outer.kind.startswith("TrigFlow"):
        return "edm" if "SCM" not in loss.kind and loss.kind else "edm-consistency"
    if outer.kind == "Precond" and "logvar_linear.weight" not in tensors:
        return "edm-consistency"  # ECT on ImageNet removes the uncertainty head
    return "edm-consistency" if any(word in loss.kind for word in ("SCM", "MSCD", "ECM")) else "edm"


def _config(
    path: Path, network: BuiltInNetwork, outer: Record, trained: str, class_names: tuple[str, ...]
) -> ModelConfig:
    sigma_data = _number(path, outer.state, "sigma_data", 0.5, 1e-6, 1e6)
    lowest = _number(path, outer.state, "sigma_min", 0.0, 0.0, 1.0)
    highest = outer.state.get("sigma_max", 80.0)
    highest = highest if isinstance(highest, int | float) and 1.0 < highest < 80.0 else 80.0
    schedule = KarrasSchedule(sigma_min=max(0.002, lowest), sigma_max=highest)
    preconditioning: AnyPreconditioning = EDMPreconditioning(sigma_data, EDM_TIME)
    match outer.kind:
        case "VPPrecond":
            betas = (_number(path, outer.state, name, 1.0, 1e-6, 1e6) for name in ("beta_d", "beta_min"))
            preconditioning = VPPreconditioning(*betas)
        case "VEPrecond":
            preconditioning = VEPreconditioning()
        case "iDDPMPrecond":
            preconditioning = IDDPMPreconditioning()
        case "TrigFlowPrecond" | "TrigFlowDDPMPPPrecond":
            preconditioning = TrigFlowPreconditioning(sigma_data)
        case "ECMPrecond" if trained == "consistency":
            preconditioning = ConsistencyPreconditioning(sigma_data, EDM_TIME)
    if trained == "edm-consistency":
        schedule = KarrasSchedule()
    if trained == "consistency" and outer.kind != "ECMPrecond":
        raise InputError(
            f"Expected --preconditioning edm or edm-consistency for the {outer.kind} of {path}, got consistency, which "
            "is for ECT and CMT; leave it out, or use one of these."
        )
    config = ModelConfig(
        network,
        preconditioning,
        schedule,
        NUM_LEVELS,
        class_names,
        clip_denoised=False,
        consistency=True if trained == "edm-consistency" else None,
    )
    return dataclasses.replace(config, tuned_sigmas=((80.0, _second_sigma(config)),) if config.distilled else ())


def _second_sigma(config: ModelConfig) -> float:
    """The second noise level of two steps: sCM, section 6; ECT, for CIFAR-10 and for ImageNet-64 (code)."""
    if isinstance(config.preconditioning, TrigFlowPreconditioning):
        return config.preconditioning.sigma_data * math.tan(1.1)
    return 1.526 if isinstance(config.network, EDM2UNet) else 0.821
