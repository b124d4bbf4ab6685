"""The convolutions of VGG16 (Simonyan and Zisserman 2015), up to the five layers that LPIPS compares."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.errors import InputError
from cm_jax.networks.operations import convolve_3x3
from cm_jax.types import Images, Params

Pooling = Literal["max", "average"]
"""2x2 pooling between stages: max as in training, average as in piq's LPIPS."""

STAGES = {1: (64, 64), 2: (128, 128), 3: (256, 256, 256), 4: (512, 512, 512), 5: (512, 512, 512)}
"""Stage -> output channels of its 3x3 convolutions conv1_1, conv1_2, conv2_1, ..."""
MIN_SIZE = 16
"""Smaller images have no pixel left in the fifth stage."""

_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation per channel of ImageNet images in [-1, 1]."""


def layers() -> dict[str, tuple[int, int]]:
    """{"conv1_1": (input channels, output channels), ...} in order."""
    found, channels = {}, 3
    for stage, outputs in STAGES.items():
        for number, output in enumerate(outputs, 1):
            found[f"conv{stage}_{number}"] = (channels, output)
            channels = output
    return found


def shapes() -> Params:
    """Kernel and bias of every convolution as jax.ShapeDtypeStruct."""
    return {
        name: {
            "kernel": jax.ShapeDtypeStruct((3, 3, *channels), jnp.float32),
            "bias": jax.ShapeDtypeStruct(channels[1:], jnp.float32),
        }
        for name, channels in layers().items()
    }


def features(
    params: Params, images: Images, *, pooling: Pooling = "max", precision: Literal["float32", "bfloat16"] = "float32"
) -> list[Float[Array, "b _ _ _"]]:
    """float32 outputs of relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 for RGB images in [-1, 1].

    Raises InputError for images that are not RGB or too small for five stages.
    """
    _, height, width, channels = images.shape
    if channels != 3 or min(height, width) < MIN_SIZE:
        raise InputError(
            f"VGG16 expects RGB images of at least {MIN_SIZE} x {MIN_SIZE} pixels, got {height} x {width} with "
            f"{channels} channels. Repeat gray images three times; resize small ones."
        )
    x = ((images - jnp.array(_MEAN)) / jnp.array(_STD)).astype(precision)
    outputs = []
    for stage, convolutions in STAGES.items():
        x = x if stage == 1 else _pooled(x, pooling)
        for number in range(1, len(convolutions) + 1):
            layer = params[f"conv{stage}_{number}"]
            x = jax.nn.relu(convolve_3x3(x, layer["kernel"]) + layer["bias"].astype(x.dtype))
        outputs.append(x.astype(jnp.float32))
    return outputs


def _pooled(x: Float[Array, "b h w c"], pooling: Pooling) -> Float[Array, "b h//2 w//2 c"]:
    """2x2 pooling; an odd last row or column is dropped, as in PyTorch."""
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return functools.reduce(jnp.maximum, corners) if pooling == "max" else sum(corners[1:], corners[0]) / 4
