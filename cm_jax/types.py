"""Types shared by the whole library, and helpers for arrays and parameter trees.

Images are NHWC float32 in [-1, 1], or beyond with noise. Noise levels sigma are standard deviations. Labels are class
indices. Axes in annotations: b batch, h height, w width, c channels.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

Images = Float[Array, "b h w c"]
Sigmas = Float[Array, " b"]
Labels = Int[Array, " b"]
Keys = Key[Array, " b"]
"""One random key per image, so that images do not depend on the other images of a batch."""

Params = dict[str, Any]
"""A nested dictionary of arrays: the parameters of a network."""

Denoiser = Callable[[Images, Sigmas], Images]
"""(x, sigma) -> an estimate of the clean image. Teacher, student, target and edited model all have this type."""

NoiseSource = Callable[[Any], Images]
"""i -> the i-th batch of standard normal noise of a sampler; i may be traced."""

ImageSize = int | tuple[int, int]
"""Height and width of images in pixels, or one number for square images."""

Precision = Literal["float32", "bfloat16", "float16"]
"""Compute precision inside a network."""

Platform = Literal["cpu", "cuda", "tpu"]
"""Platforms for which programs are exported."""


def per_image(values: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    """One value per image as [b, 1, 1, 1], to broadcast over pixels."""
    return values[:, None, None, None]


def height_width(size: ImageSize) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def in_pixels(shape: tuple[int, ...]) -> str:
    """The size of images [height, width, ...] in words: "64 pixels", or "16 x 32 pixels (height x width)"."""
    height, width = shape[:2]
    return f"{height} pixels" if height == width else f"{height} x {width} pixels (height x width)"


def normal_per_image(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise of `shape` for every key: float32, because float64 numbers (jax_enable_x64) are others."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, np.float32))(keys)


def split_keys(keys: Keys) -> Key[Array, "3 b"]:
    """Three new keys for every image."""
    return jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """("a/b/c", leaf) for every leaf of a nested dictionary, in its order."""
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [pair for name, branch in tree.items() for pair in leaves(branch, f"{path}/{name}" if path else name)]


def digest(tree: Any) -> str:
    """SHA-256 of all leaves of a nested dictionary of arrays, in the order of their names."""
    found = hashlib.sha256()
    for _, leaf in sorted(leaves(tree), key=lambda pair: pair[0]):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def nested(flat: Mapping[str, Any]) -> Params:
    """The inverse of `leaves`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *branches, name = path.split("/")
        place = tree
        for branch in branches:
            place = place.setdefault(branch, {})
        place[name] = leaf
    return tree


def parameter_count(tree: Any) -> int:
    """Number of parameters of a tree of arrays, or of a network's `shapes()`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@runtime_checkable
class Network(Protocol):
    """A network without its parameters. Hashable, so that it can be a static argument of jit.

    cm_jax.networks.BaseNetwork has everything but image_shape, initialize and predict.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def classes(self) -> int | None: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def attention(self) -> str: ...
    @property
    def interval_embedding(self) -> bool: ...
    @property
    def guidance_embedding(self) -> bool: ...
    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
        *,
        guidance: Float[Array, " b"] | None = None,
    ) -> Images: ...
    def check_input(self, shape: tuple[int, ...], labeled: bool) -> None: ...
    def shapes(self) -> Params: ...
    def initialize(self, key: Key[Array, ""]) -> Params: ...
    def prepare(self, params: Params) -> Params: ...
    def constrain(self, params: Params) -> Params: ...
    def at_precision(self, precision: Precision) -> "Network": ...
