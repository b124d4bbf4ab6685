"""Operations of the networks, each with a C++ kernel for CPUs and an XLA form for everything else."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cm_jax import kernels
from cm_jax.errors import InputError

Implementation = Literal["auto", "plain", "cudnn"]
"""plain: XLA, or the CPU kernel in attention.cc; supports forward-mode derivatives, which continuous-time objectives
need. cudnn: NVIDIA's fused kernel, half precision and reverse mode only, an InputError where it cannot run. auto: cudnn
where it can run, else plain."""

Heads = Float[Array, "b s n d"]
"""Queries, keys or values: batch, position, head, channel."""

PerImage = Float[Array, "b c"]


def product_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """HIGHEST for float32, so that GPUs do not use TF32 and TPUs do not use bfloat16; None for other dtypes."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _in_float32(kernel: Callable[..., Array], *args: Array, **settings: Any) -> Array:
    """The result of a float32 kernel, rounded to the precision of the first argument."""
    return kernel(*(arg.astype(jnp.float32) for arg in args), **settings).astype(args[0].dtype)


def multiply(x: Float[Array, "... i"], matrix: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """x @ matrix in the precision of x."""
    if x.ndim > 2 and kernels.suits(x, matrix.shape[-1]):
        rows = _in_float32(kernels.multiply, x.reshape(-1, x.shape[-1]), matrix)
        return rows.reshape(*x.shape[:-1], matrix.shape[-1])
    return jnp.dot(x, matrix, precision=product_precision(x.dtype))


def convolve_3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *, stride: int = 1, padding: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """3x3 convolution with `padding` rows of zeros on every side, in the precision of x.

    Padding follows PyTorch: with stride 2 and even sizes it differs from XLA's "SAME", which pads (0, 1).
    """
    kernel, strides, sides = kernel.astype(x.dtype), (stride, stride), [(padding, padding)] * 2
    if max(x.shape[1:3]) <= 2 and stride == padding == 1:
        return _tiny_convolution(x, kernel)
    if stride == padding == 1 and min(x.shape[1:3]) > 2 and kernels.suits(x, kernel.shape[-1]):
        return _in_float32(kernels.convolve, x, kernel)
    layout, precision = ("NHWC", "HWIO", "NHWC"), product_precision(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, strides, sides, dimension_numbers=layout, precision=precision)


def _tiny_convolution(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """3x3 convolution of images of at most 2x2 pixels, as one matrix product.

    XLA on CPUs is slow for images smaller than the kernel: 240 ms instead of 8 ms in the last stage of LPIPS at 32
    pixels.
    """
    height, width = x.shape[1:3]
    rows = jnp.stack([kernel[1 - above : 1 - above + height] for above in range(height)])
    between = jnp.stack([rows[:, :, 1 - left : 1 - left + width] for left in range(width)], axis=1)
    return jnp.einsum("bhwi,yxhwio->byxo", x, between, precision=product_precision(x.dtype))


def concatenated(x: Float[Array, "b h w c"], y: Float[Array, "b h w d"]) -> list[Array]:
    """Both arrays, for layers that take parts; with CPU kernels, which do not, one array of all channels."""
    joined = jnp.concatenate([x, y], axis=-1)
    return [joined] if kernels.suits(joined) else [x, y]


def group_norm(
    x: Float[Array, "b h w c"],
    offset: Float[Array, "b d"] | None,
    gain: Float[Array, "b d"],
    bias: Float[Array, "b d"],
    *more: Float[Array, "b h w _"],
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> Float[Array, "b h w d"]:
    """act(gain n + bias), where n is x + offset with mean 0 and variance 1 in every group of channels per image.

    x: also the arrays `more`, concatenated along channels. Computed in float32, returned in the precision of x. act is
    SiLU or the identity. On CPUs it is one C++ kernel.
    """
    settings: dict[str, Any] = {"groups": groups, "epsilon": epsilon, "silu": silu}
    if not more and kernels.suits(x) and x.shape[-1] % groups == 0:
        offset = jnp.zeros_like(gain) if offset is None else offset
        rows = (jnp.broadcast_to(each, (x.shape[0], x.shape[-1])) for each in (offset, gain, bias))
        return _in_float32(_fused_norm, x, *rows, **settings)
    return _plain_norm(x, offset, gain, bias, *more, **settings)


def _plain_norm(
    x: Array,
    offset: Array | None,
    gain: Array,
    bias: Array,
    *more: Array,
    groups: int,
    epsilon: float,
    silu: bool,
) -> Array:
    """Combine means and variances per channel into those per group."""
    parts = [x, *more]
    starts = list(itertools.accumulate(part.shape[-1] for part in parts))[:-1]
    if offset is not None:
        offsets = jnp.split(offset[:, None, None].astype(x.dtype), starts, axis=-1)
        parts = [part + own for part, own in zip(parts, offsets, strict=True)]
    group_mean, group_variance = _group_moments(parts, groups)
    factor = gain * jax.lax.rsqrt(group_variance + epsilon)
    columns = (jnp.split(each[:, None, None], starts, axis=-1) for each in (group_mean, factor, bias))
    results = []
    for part, own_mean, own_factor, own_bias in zip(parts, *columns, strict=True):
        normal = ((part.astype(jnp.float32) - own_mean) * own_factor + own_bias).astype(x.dtype)
        results.append(jax.nn.silu(normal) if silu else normal)
    return jnp.concatenate(results, axis=-1)


def _group_moments(parts: Sequence[Array], groups: int) -> tuple[Array, Array]:
    """Mean and variance [b, c] of the group of every channel, in float32.

    In half precision from one pass over the parts, as mean square minus squared mean. Its rounding error is below the
    change that rounding x to 8 or 11 bits makes to the variance. In float32 this difference would cancel, and the
    variance takes a second pass.
    """
    pixels = [part.astype(jnp.float32) for part in parts]
    means = [part.mean((1, 2)) for part in pixels]
    mean, single = jnp.concatenate(means, axis=1), parts[0].dtype == jnp.float32
    group_mean = _group_mean(mean, groups)
    shifts = [own[:, None, None] if single else 0 for own in means]
    squares = [jnp.square(part - shift).mean((1, 2)) for part, shift in zip(pixels, shifts, strict=True)]
    square = jnp.concatenate(squares, axis=1)
    if single:
        return group_mean, _group_mean(square + jnp.square(mean - group_mean), groups)
    return group_mean, jnp.maximum(_group_mean(square, groups) - jnp.square(group_mean), 0)


_fused_norm = kernels.differentiable("cm_jax_norm", _plain_norm, "b h w c, b c, b c, b c -> b h w c")


def _group_mean(values: PerImage, groups: int) -> PerImage:
    """Each channel's value replaced by the mean over its group of adjacent channels."""
    size = values.shape[1] // groups
    return jnp.repeat(values.reshape(-1, groups, size).mean(-1), size, axis=1)


def attend(qkv: Float[Array, "b s c3"], heads: int, implementation: Implementation = "auto") -> Float[Array, "b s c"]:
    """softmax(q k^T / sqrt(d)) v for every head, with a float32 softmax.

    qkv: queries, keys and values as thirds of the channels, each ordered by head. On CPUs attention.cc keeps the scores
    in the cache.
    """
    pixels, head_dim = qkv.shape[1], qkv.shape[2] // 3 // heads
    whole = 3 * heads * head_dim == qkv.shape[2]
    if implementation != "cudnn" and whole and kernels.suits(qkv, head_dim) and kernels.suits(qkv, pixels):
        return _in_float32(_fused_attention, qkv, heads=heads)
    query, key, value = _split(qkv, heads)
    if implementation != "plain" and not kernels.switched_off() and _cudnn_runs(query, implementation):
        mixed = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return mixed.reshape(*qkv.shape[:2], heads * head_dim)
    return _plain_attention(qkv, heads=heads)


def _plain_attention(qkv: Array, *, heads: int) -> Array:
    query, key, value = _split(qkv, heads)
    precision = product_precision(query.dtype)
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    mixed = jnp.einsum("bnqk,bknd->bqnd", weights.astype(value.dtype), value, precision=precision)
    return mixed.reshape(*qkv.shape[:2], qkv.shape[2] // 3)


_fused_attention = kernels.differentiable("cm_jax_attention", _plain_attention, "b s 3c -> b s c")


def _split(qkv: Array, heads: int) -> list[Heads]:
    """[queries, keys, values]."""
    return [part.reshape(*qkv.shape[:2], heads, part.shape[-1] // heads) for part in jnp.split(qkv, 3, axis=-1)]


def _cudnn_runs(query: Heads, implementation: Implementation) -> bool:
    """Whether cuDNN has a fused kernel for these queries: heads of at most 128 channels, since Hopper of 256.

    Raises InputError if not, and the implementation is cudnn.
    """
    capability, head_dim = _cuda_capability(), query.shape[-1]
    supported = query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0
    runs = supported and capability > 0 and head_dim <= (256 if capability >= 9 else 128)
    if implementation == "cudnn" and not runs:
        raise InputError(
            "The attention cudnn needs an NVIDIA GPU, bfloat16 or float16, and heads of 8, 16, ... 128 channels (256 "
            f"since Hopper); got {query.dtype} and heads of {head_dim} channels on {jax.default_backend()}. Use the "
            "attention auto or plain."
        )
    return runs


def _cuda_capability() -> float:
    """Compute capability of the first device; 0 if it is not an NVIDIA GPU."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version.lower():
        return 0.0
    return float(jax.devices()[0].compute_capability)
