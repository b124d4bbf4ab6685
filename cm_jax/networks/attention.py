"""Softmax attention over the pixels of an image."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax import kernels
from cm_jax.networks.precision import product_precision

Implementation = Literal["auto", "plain", "cudnn"]
"""plain: XLA, or the CPU kernel in attention.cc; supports forward-mode derivatives, which continuous-time objectives
need. cudnn: NVIDIA's fused kernel, half precision and reverse mode only. auto: cudnn where it can run, else plain."""

Heads = Float[Array, "b s n d"]
"""Queries, keys or values: batch, position, head, channel."""


def attend(qkv: Float[Array, "b s c3"], heads: int, implementation: Implementation = "auto") -> Float[Array, "b s c"]:
    """softmax(q k^T / sqrt(d)) v for every head, with a float32 softmax.

    qkv: queries, keys and values as thirds of the channels, each ordered by head. float32 on CPUs uses attention.cc,
    which keeps the scores in the cache.
    """
    pixels, head_dim = qkv.shape[1], qkv.shape[2] // 3 // heads
    if implementation != "cudnn" and kernels.suits(qkv, head_dim) and kernels.suits(qkv, pixels):
        return _fused(qkv, heads=heads)
    query, key, value = _split(qkv, heads)
    if implementation == "cudnn" or (implementation == "auto" and _cudnn_runs(query)):
        return _merge(jax.nn.dot_product_attention(query, key, value, implementation="cudnn"))
    return _plain(qkv, heads=heads)


def _plain(qkv: Array, *, heads: int) -> Array:
    query, key, value = _split(qkv, heads)
    precision = product_precision(query.dtype)
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return _merge(jnp.einsum("bnqk,bknd->bqnd", weights.astype(value.dtype), value, precision=precision))


_fused = kernels.differentiable("cm_jax_attention", _plain, lambda x, *, heads: (*x.shape[:2], x.shape[2] // 3))


def _split(qkv: Array, heads: int) -> tuple[Heads, Heads, Heads]:
    b, s, _ = qkv.shape
    query, key, value = (part.reshape(b, s, heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    return query, key, value


def _merge(heads: Heads) -> Array:
    return heads.reshape(*heads.shape[:2], -1)


def _cudnn_runs(query: Heads) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if not (half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128):
        return False
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()
