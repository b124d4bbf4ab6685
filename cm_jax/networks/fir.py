"""Anti-aliased resampling with a binomial filter (StyleGAN2; NCSN++, Song et al. 2021, appendix H).

The filter is [1, 3, 3, 1] / 8 along each axis, with zero padding. It is written as shifts and sums of whole images,
which XLA fuses and which have derivatives of every mode and order.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Filter = Literal["fir", "plain"]
"""fir: [1, 3, 3, 1]. plain: [1, 1], the mean of two pixels."""

TAPS: dict[Filter, tuple[int, ...]] = {"fir": (1, 3, 3, 1), "plain": (1, 1)}


def smoothed(x: Float[Array, "b h w c"], taps: Filter = "fir") -> Float[Array, "b h+1 w+1 c"]:
    """Filtered values at the corners between pixels, borders included: one more than pixels along each axis."""
    weights = TAPS[taps]
    edge = len(weights) // 2
    for axis in (1, 2):
        padded = jnp.pad(x, [(edge, edge) if i == axis else (0, 0) for i in range(4)])
        count = x.shape[axis] + 1
        shifted = (jnp.take(padded, jnp.arange(start, start + count), axis=axis) for start in range(len(weights)))
        x = sum((weight * part for weight, part in zip(weights, shifted, strict=True)), jnp.zeros((), x.dtype))
        x = x / sum(weights)
    return x


def fir_downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Downsample: out[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8 along each axis."""
    return smoothed(x)[:, 1::2, 1::2]


def fir_upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Upsample: out[2i] = (x[i-1] + 3 x[i]) / 4 and out[2i+1] = (3 x[i] + x[i+1]) / 4 along each axis."""
    for axis in (1, 2):
        count = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        before, after = (jnp.take(padded, jnp.arange(start, start + count), axis=axis) for start in (0, 2))
        pairs = jnp.stack([(before + 3 * x) / 4, (3 * x + after) / 4], axis=axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * count, *x.shape[axis + 1 :])
    return x
