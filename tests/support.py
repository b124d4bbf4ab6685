"""Helpers of the tests: recorded outputs, small models, subprocesses."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax import progress
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.rules import from_source, source_shapes
from cm_jax.conversion.unet_format import UNetFormat
from cm_jax.io.safetensors import LazyTensor
from cm_jax.networks import ADMUNet
from cm_jax.types import Denoiser, Network, Params


@contextlib.contextmanager
def announced() -> Iterator[list[str]]:
    """The activities that begin in the block, as shown to the user."""
    found: list[str] = []

    @contextlib.contextmanager
    def listener(activity: progress.Activity) -> Iterator[None]:
        found.append(str(activity))
        yield

    with progress.listening(listener):
        yield found


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "cm_jax" / "assets" / "emoji16_cd.pt"

SMALL = ADMUNet(
    image_size=16,
    base_channels=32,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_factors=(2,),
    head_dim=16,
    classes=10,
)
"""The network of the golden files adm_class_cond."""


def nhwc(array: np.ndarray) -> np.ndarray:
    """Move channels last: [..., c, h, w] to [..., h, w, c]."""
    return np.moveaxis(array, -3, -1)


def relative(actual, expected) -> float:
    """Largest absolute difference / largest absolute expected value."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@functools.cache
def adm_golden(name: str) -> tuple[ADMUNet, Params, dict[str, np.ndarray]]:
    """Network, float32 parameters and recorded arrays of the golden files adm_{name}, read like a user's checkpoint."""
    architecture = json.loads((DATA / "openai" / f"adm_{name}.json").read_text())
    hints = CheckpointHints(architecture.get("num_head_channels"), architecture.get("num_heads"), "consistency", 40, 16)
    source = read(DATA / "openai" / f"adm_{name}.pt", hints)
    network = source.config.network
    assert isinstance(network, ADMUNet)
    with np.load(DATA / "openai" / f"adm_{name}_forward.npz") as recorded:
        return network, network.prepare(source.params), dict(recorded)


def filled(format: UNetFormat, network: ADMUNet, fill) -> Params:
    """Parameters of `network` with fill(name, shape) for every source tensor of a third-party format."""
    rules, shapes = format.rules(network), network.shapes()
    tensors = {
        name: LazyTensor(shape, np.dtype(np.float32), functools.partial(fill, name, shape))
        for name, shape in source_shapes(rules, shapes).items()
    }
    return network.prepare(from_source(rules, shapes, tensors, source="a formula"))


def integer_tensors(shapes, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random integers for every name and shape, which all floating-point dtypes represent."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-99, 99, shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def lazy(arrays) -> dict[str, LazyTensor]:
    """Arrays as if they were tensors of a file."""
    return {name: LazyTensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def assert_bitwise_equal(found, expected) -> None:
    """Compare dictionaries of arrays."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def tensor_names(format: UNetFormat, network: ADMUNet) -> list[str]:
    return [name for rule in format.rules(network) for name in rule.sources]


def random_params(network: Network, seed: int = 0) -> Params:
    """Random parameters at the scale of the initialization, with no leaf at zero.

    Uses NumPy, because JAX would compile a program for each shape.
    """
    dice = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = dice.standard_normal(shape.shape, np.float32)
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(noise / np.sqrt(np.prod(shape.shape[:-1]), dtype=np.float32))
        return jnp.asarray(1 + 0.1 * noise if name == "scale" else 0.1 * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, network.shapes())


@functools.cache
def compiled(network: Network) -> Network:
    """The network with a jitted `predict`, shared by all tests."""
    same = dataclasses.replace(network)
    object.__setattr__(same, "predict", jax.jit(network.predict))
    return same


def gaussian_denoiser(std: float = 0.5) -> Denoiser:
    """The exact denoiser of data from N(0, std^2): D(x, sigma) = x std^2 / (std^2 + sigma^2)."""
    return lambda x, sigma: x * (std**2 / (std**2 + sigma[:, None, None, None] ** 2))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command from the repository root in a subprocess, by default with one CPU device."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
