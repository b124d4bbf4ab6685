"""Check of a conversion: the JAX network against a PyTorch network on the same inputs.

That is UNet2DModel of diffusers for the networks of OpenAI, and `EDMReference` for those of the EDM family.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax.conversion import edm_parity
from cm_jax.conversion.diffusers import unet_config
from cm_jax.conversion.read import Source
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.torch_files import as_torch
from cm_jax.conversion.unet_format import DIFFUSERS
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, BuiltInNetwork
from cm_jax.networks.layers import NORM_GROUPS
from cm_jax.types import Params

BOUND = 1e-5
"""Allowed difference relative to the largest output: float32 rounding through about a hundred layers."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """Result of a comparison. Differences are relative to the largest absolute value of PyTorch's output."""

    parts: dict[str, float]
    """Differences of the network and, for the EDM family, of its uncertainty and of its preconditioning."""
    inputs: int
    reference: str
    units: dict[str, float]
    """Difference of each unit, in order; only where that of the network exceeds the bound."""

    @property
    def difference(self) -> float:
        """The largest difference."""
        return max(self.parts.values())

    @property
    def passed(self) -> bool:
        return self.difference <= BOUND

    def report(self) -> str:
        """A line, and a table of the parts and units where the bound is exceeded."""
        verdict = "within" if self.passed else "OVER"
        line = (
            f"Parity with PyTorch ({self.reference}, float32, {self.inputs} inputs): largest relative "
            f"difference {self.difference:.1e}, {verdict} the bound of {BOUND:.0e}."
        )
        shown = self.units if self.passed else {**self.parts, **self.units}
        table = [f"  {value:9.1e}{'  <--' if value > BOUND else ''}  {name}" for name, value in shown.items()]
        return "\n".join([line, *table])


def compare(source: Source, *, inputs: int = 3, seed: int = 0) -> Parity:
    """Run both networks on `inputs` noisy images, from sigma_max to sigma_min, with seeded labels.

    The PyTorch network loads the tensors of a diffusers source and of an EDM pickle as they are, and other parameters
    through the rules of the diffusers or EDM format. Raises InputError where PyTorch or diffusers is not installed, or
    neither format has the network.
    """
    config = source.config
    if not isinstance(config.network, BuiltInNetwork):
        raise InputError(f"--check needs a network of this package, not {type(config.network).__name__}: leave it out.")
    network = dataclasses.replace(config.network, precision="float32", attention="plain")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, *network.image_shape), np.float32)
    sigmas = np.geomspace(config.schedule.sigma_max, config.schedule.sigma_min, inputs, dtype=np.float32)
    times = np.asarray(config.preconditioning.c_noise(jnp.asarray(sigmas)))
    labels = None if network.classes is None else rng.integers(0, network.classes, inputs).astype(np.int32)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), source.params)
    if isinstance(network, ADMUNet) and network.variant == "openai":
        return _compare_diffusers(source, network, params, x, times, labels)
    return _compare_edm(source, network, params, x, sigmas, times, labels, rng)


def _compare_diffusers(
    source: Source, network: ADMUNet, params: Params, x: np.ndarray, times: np.ndarray, labels: np.ndarray | None
) -> Parity:
    if source.format is DIFFUSERS:
        tensors = {name: tensor.read() for name, tensor in source.tensors.items()}
    else:
        try:
            tensors = to_source(DIFFUSERS.rules(network), source.params)
        except InputError as error:
            raise InputError(f"--check cannot run this network in PyTorch; leave out --check. {error}") from error
    reference = reference_network(network, tensors)
    del tensors
    expected, expected_units = _run_reference(reference, network, x, times, labels)
    difference = _relative(jax.jit(network.predict)(params, x, times, labels), expected)
    units = {}
    if difference > BOUND:
        outputs = jax.jit(network.inner_outputs)(params, x, times, labels)
        units = {name: _relative(outputs[name], value) for name, value in expected_units.items()}
    return Parity({"network": difference}, len(x), "UNet2DModel of diffusers", units)


def _compare_edm(
    source: Source,
    network: BuiltInNetwork,
    params: Params,
    x: np.ndarray,
    sigmas: np.ndarray,
    times: np.ndarray,
    labels: np.ndarray | None,
    rng: np.random.Generator,
) -> Parity:
    """The last image has no label; the first has parameters of an augmentation."""
    with _required_packages():
        reference = edm_parity.Reference(source)
    one_hot = None
    if labels is not None:
        labels[-1] = network.classes
        one_hot = np.eye(network.classes + 1, network.classes, dtype=np.float32)[labels]  # type: ignore[operator]
    given = edm_parity.Inputs(x, times, one_hot)
    augmentation, segment = None, None
    if network.augment_dim:
        augmentation = rng.standard_normal((len(x), network.augment_dim)).astype(np.float32)
        augmentation[1:] = 0
    if network.interval_embedding:
        segment = times * np.float32(0.3)
    expected = reference.run(dataclasses.replace(given, augmentation=augmentation, segment=segment))
    output = jax.jit(network.predict)(params, x, times, labels, None, segment, augmentation)
    parts = {"network": _relative(output, expected)}
    if network.uncertainty:
        variance = reference.log_variance(times)
        parts["uncertainty"] = _relative(jax.jit(network.log_variance)(params, times), variance)
    coefficients, lowest = source.config.preconditioning, source.config.schedule.sigma_min
    for name, value in edm_parity.preconditioning(source, sigmas).items():
        arguments = (jnp.asarray(sigmas), lowest) if name in ("c_skip", "c_out") else (jnp.asarray(sigmas),)
        parts[name] = _relative(getattr(coefficients, name)(*arguments), value)
    units = {}
    if parts["network"] > BOUND:
        reference.run(given)
        outputs = jax.jit(network.inner_outputs)(params, x, times, labels)
        units = {name: _relative(outputs[name], value) for name, value in reference.units(network).items()}
    return Parity(parts, len(x), "the network of the EDM family", units)


def reference_network(network: ADMUNet, tensors: dict[str, np.ndarray]) -> Any:
    """UNet2DModel of diffusers for `network`, with exactly these tensors, in float32 and evaluation mode."""
    with _required_packages():
        import torch
        from diffusers.models.unets.unet_2d import UNet2DModel
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


@contextlib.contextmanager
def _required_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"The check requires {error.name}, which is not installed: pip install torch diffusers, or convert without "
            "--check."
        ) from error


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
