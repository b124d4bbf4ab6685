"""Group normalization, fused with modulation and SiLU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax import kernels

PerImage = Float[Array, "b c"]


def group_norm(
    x: Float[Array, "b h w c"],
    offset: PerImage | None,
    gain: PerImage,
    bias: PerImage,
    *,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> Float[Array, "b h w c"]:
    """act(gain n + bias), where n is x + offset with mean 0 and variance 1 in every group of channels per image.

    Computed in float32, returned in the precision of x. act is SiLU or the identity. On CPUs it is one C++ kernel.
    """
    if kernels.suits(x) and x.shape[-1] % groups == 0:
        offset = jnp.zeros_like(gain) if offset is None else offset
        return _fused(x, offset, gain, bias, groups=groups, epsilon=epsilon, silu=silu)
    return _plain(x, offset, gain, bias, groups=groups, epsilon=epsilon, silu=silu)


def _plain(
    x: Array, offset: Array | None, gain: Array, bias: Array, *, groups: int, epsilon: float, silu: bool
) -> Array:
    """Combine means and variances per channel into those per group. Sums of squares would cancel in float32."""
    moved = x if offset is None else x + offset[:, None, None].astype(x.dtype)
    pixels = moved.astype(jnp.float32)
    mean = pixels.mean((1, 2))
    variance = jnp.square(pixels - mean[:, None, None]).mean((1, 2))
    group_mean = _group_mean(mean, groups)
    group_variance = _group_mean(variance + jnp.square(mean - group_mean), groups)
    factor = gain * jax.lax.rsqrt(group_variance + epsilon)
    normal = (pixels - group_mean[:, None, None]) * factor[:, None, None] + bias[:, None, None]
    normal = normal.astype(x.dtype)
    return jax.nn.silu(normal) if silu else normal


_fused = kernels.differentiable("cm_jax_norm", _plain, lambda x, *_, **__: x.shape)


def _group_mean(values: PerImage, groups: int) -> PerImage:
    """Each channel's value replaced by the mean over its group of adjacent channels."""
    b, c = values.shape
    means = values.reshape(b, groups, c // groups).mean(-1)
    return jnp.repeat(means, c // groups, axis=1)
