"""Check of a conversion: the JAX network against the PyTorch network of diffusers on the same inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax.conversion.diffusers import unet_config
from cm_jax.conversion.read import Source
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.torch_files import as_torch
from cm_jax.conversion.unet_format import DIFFUSERS
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.networks.layers import NORM_GROUPS

BOUND = 1e-5
"""Allowed difference relative to the largest output: float32 rounding through about a hundred layers."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """Result of a comparison. Differences are relative to the largest absolute value of PyTorch's output."""

    difference: float
    inputs: int
    units: dict[str, float]
    """Difference of each unit, in order; only where `difference` exceeds the bound."""

    @property
    def passed(self) -> bool:
        return self.difference <= BOUND

    def report(self) -> str:
        """A line, and a table of the units where the bound is exceeded."""
        verdict = "within" if self.passed else "OVER"
        line = (
            f"Parity with PyTorch (UNet2DModel of diffusers, float32, {self.inputs} inputs): largest relative "
            f"difference {self.difference:.1e}, {verdict} the bound of {BOUND:.0e}."
        )
        table = [f"  {value:9.1e}{'  <--' if value > BOUND else ''}  {name}" for name, value in self.units.items()]
        return "\n".join([line, *table])


def compare(source: Source, *, inputs: int = 3, seed: int = 0) -> Parity:
    """Run both networks on `inputs` noisy images, from sigma_max to sigma_min, with seeded labels.

    The PyTorch network loads the tensors of a diffusers source as they are, and other parameters through the rules of
    the diffusers format. Raises InputError where PyTorch or diffusers is not installed, or UNet2DModel cannot represent
    the network.
    """
    if not isinstance(source.config.network, ADMUNet):
        kind = type(source.config.network).__name__
        raise InputError(f"--check compares ADM U-Nets with diffusers, got a {kind}: leave out --check.")
    network = dataclasses.replace(source.config.adm, precision="float32", attention="plain")
    if source.format is DIFFUSERS:
        tensors = {name: tensor.read() for name, tensor in source.tensors.items()}
    else:
        tensors = to_source(DIFFUSERS.rules(network), source.params)
    reference = reference_network(network, tensors)
    del tensors

    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, *network.image_shape), np.float32)
    sigmas = np.geomspace(source.config.schedule.sigma_max, source.config.schedule.sigma_min, inputs, dtype=np.float32)
    times = np.asarray(source.config.preconditioning.c_noise(jnp.asarray(sigmas)))
    labels = None if network.classes is None else rng.integers(0, network.classes, inputs).astype(np.int32)

    expected, expected_units = _run_reference(reference, network, x, times, labels)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), source.params)
    arguments = (params, jnp.asarray(x), jnp.asarray(times), None if labels is None else jnp.asarray(labels))
    difference = _relative(jax.jit(network.predict)(*arguments), expected)
    if difference <= BOUND:
        return Parity(difference, inputs, {})
    outputs = jax.jit(network.inner_outputs)(*arguments)
    return Parity(difference, inputs, {name: _relative(outputs[name], value) for name, value in expected_units.items()})


def reference_network(network: ADMUNet, tensors: dict[str, np.ndarray]) -> Any:
    """UNet2DModel of diffusers for `network`, with exactly these tensors, in float32 and evaluation mode."""
    try:
        import torch
        from diffusers.models.unets.unet_2d import UNet2DModel
    except ImportError as error:
        raise InputError(
            f"The check requires {error.name}, which is not installed: pip install torch diffusers, or convert without "
            "--check."
        ) from error
    # UNet2DModel has one head_dim for all levels; for a network with a fixed number of heads, set it in each block.
    uniform = network if network.head_dim else dataclasses.replace(network, heads=None, head_dim=NORM_GROUPS)
    with torch.device("meta"):
        reference: Any = UNet2DModel.from_config(unet_config(uniform))
    state = {name: as_torch(array).float() for name, array in tensors.items()}
    reference.load_state_dict(state, strict=True, assign=True)
    for module in reference.modules():
        if type(module).__name__ == "Attention":
            channels = module.to_q.in_features
            module.heads = network.heads_for(channels)
            module.scale = (channels // module.heads) ** -0.5
    return reference.eval()


def _run_reference(
    reference: Any, network: ADMUNet, x: np.ndarray, times: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output, and the outputs of all units by parameter path, NHWC."""
    import torch

    found: dict[str, np.ndarray] = {}
    for path, _, prefix in DIFFUSERS.units(network):
        reference.get_submodule(prefix).register_forward_hook(
            lambda module, args, output, path=path: found.__setitem__(path, _nhwc(output))
        )
    images, c_noise = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(times.copy())
    with torch.no_grad():
        classes = None if labels is None else torch.from_numpy(labels).long()
        return _nhwc(reference(images, c_noise, class_labels=classes).sample), found


def _nhwc(tensor: Any) -> np.ndarray:
    return tensor.numpy().transpose(0, 2, 3, 1)


def _relative(output: jax.Array, reference: np.ndarray) -> float:
    return float(np.abs(np.asarray(output) - reference).max() / max(np.abs(reference).max(), np.finfo(np.float32).tiny))
