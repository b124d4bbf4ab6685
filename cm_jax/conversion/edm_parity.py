"""What the parity check compares for the EDM family: a checkpoint in PyTorch, and the preconditioning of its pickle."""

import dataclasses
import re
from typing import Any

import numpy as np
from jaxtyping import Float

from cm_jax.conversion import edm_names
from cm_jax.conversion.edm_reference import EDMReference, Facts
from cm_jax.conversion.edm_writing import write_state_dict
from cm_jax.conversion.read import Source
from cm_jax.conversion.torch_files import as_torch
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, TrigFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import BuiltInNetwork

_BALANCES = ("label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act")
_FIELDS = {"res_balance": "residual_balance", "attn_balance": "attention_balance", "clip_act": "clip"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of a network; the arrays that it does not take are None."""

    x: Float[np.ndarray, "b h w c"]
    c_noise: Float[np.ndarray, " b"]
    one_hot: Float[np.ndarray, "b k"] | None
    """A row of zeros stands for no class."""
    augmentation: Float[np.ndarray, "b a"] | None = None
    segment: Float[np.ndarray, " b"] | None = None
    """c_noise at the lower end of the segment."""


class Reference:
    """A checkpoint in PyTorch. Raises InputError where the EDM family does not have its network."""

    def __init__(self, source: Source) -> None:
        if source.record:
            tensors = {name: tensor.read() for name, tensor in source.tensors.items()}
        else:
            try:
                written = write_state_dict(source.config, source.params)
            except InputError as error:
                raise InputError(f"--check cannot run this network in PyTorch; leave out --check. {error}") from error
            tensors = {re.sub(r"^(model|unet)\.", "", name): array for name, array in written.items()}
        self._sign = -1 if isinstance(source.config.preconditioning, TrigFlowPreconditioning) else 1
        self._channels = source.config.network.image_shape[2]
        self._network = EDMReference(
            {name: as_torch(array).float() for name, array in tensors.items()}, _facts(source, tensors)
        )

    def run(self, inputs: Inputs) -> np.ndarray:
        """The network's output, NHWC."""
        import torch

        given = (None if each is None else torch.from_numpy(each.copy()) for each in dataclasses.astuple(inputs)[1:])
        with torch.no_grad():
            x = torch.from_numpy(inputs.x.transpose(0, 3, 1, 2).copy())
            return self._sign * _nhwc(self._network(x, *given))[..., : self._channels]

    def units(self, network: BuiltInNetwork) -> dict[str, np.ndarray]:
        """Outputs of the blocks in the last run, by the path of their last unit."""
        paths = {name: path for path, unit, name in edm_names.units(network) if unit.kind != "pyramid"}
        return {path: _nhwc(self._network.outputs[name]) for name, path in paths.items()}

    def log_variance(self, c_noise: np.ndarray) -> np.ndarray:
        """The uncertainty of every noise level."""
        import torch

        with torch.no_grad():
            return self._network.log_variance(torch.from_numpy(c_noise.copy())).numpy()


def _nhwc(tensor: Any) -> np.ndarray:
    return tensor.numpy().transpose(0, 2, 3, 1)


def _facts(source: Source, tensors: dict[str, np.ndarray]) -> Facts:
    """As the pickle states them, otherwise from the model's config."""
    network = source.config.network
    if source.record is None:
        assert isinstance(network, BuiltInNetwork)
        matches = ((re.fullmatch(r"(.*)\.(attn_)?qkv\.weight", name), array) for name, array in tensors.items())
        heads = {match[1]: network.heads_for(array.shape[1]) for match, array in matches if match}
        fields = {name: getattr(network, _FIELDS.get(name, name), None) for name in _BALANCES}
        return Facts(heads, **{name: value for name, value in fields.items() if value is not None})
    heads, stated = {}, {}
    for name, module in source.record.modules().items():
        if count := (module.state or {}).get("num_heads"):
            heads[name.partition(".")[2]] = count
        stated |= {key: float(module.state[key]) for key in _BALANCES if key in (module.state or {})}
    return Facts(heads, **stated)


def preconditioning(source: Source, sigma: np.ndarray) -> dict[str, np.ndarray]:
    """c_in, c_skip, c_out and c_noise of the class that a pickle names, in float64; empty for other checkpoints."""
    if source.record is None:
        return {}
    kind, state, s = source.record.kind, source.record.state, sigma.astype(np.float64)
    data = float(state.get("sigma_data", 0.5))
    if kind.startswith("TrigFlow"):
        t = np.arctan(s / data)
        return {"c_in": np.cos(t) / data, "c_skip": np.cos(t) ** 2, "c_out": np.sin(t) * data, "c_noise": t}
    if kind in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):
        vp = kind == "VPPrecond"
        c_in = np.ones_like(s) if kind == "VEPrecond" else 1 / np.sqrt(s**2 + 1)
        c_out = s if kind == "VEPrecond" else -s
        if vp:
            b, a = float(state["beta_d"]), float(state["beta_min"])
            c_noise = 999 * (np.sqrt(a**2 + 2 * b * np.log1p(s**2)) - a) / b
        elif kind == "VEPrecond":
            c_noise = np.log(s / 2)
        else:
            c_noise = 999.0 - np.abs(s[:, None] - source.tensors["u"].read()).argmin(axis=1)
        return {"c_in": c_in, "c_skip": np.ones_like(s), "c_out": c_out, "c_noise": c_noise}
    total = np.sqrt(s**2 + data**2)
    # ECMPrecond does not state whether it is ECT's, with a boundary, or TCM's
    boundary = kind == "ECMPrecond" and isinstance(source.config.preconditioning, ConsistencyPreconditioning)
    low = float(state["sigma_min"]) if boundary else 0.0
    c_skip = data**2 / ((s - low) ** 2 + data**2)
    return {"c_in": 1 / total, "c_skip": c_skip, "c_out": (s - low) * data / total, "c_noise": np.log(s) / 4}
