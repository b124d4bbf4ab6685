"""Softmax attention over the pixels of an image, plain or fused."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax import kernels
from cm_jax.networks.precision import product_precision

Implementation = Literal["auto", "plain", "cudnn"]
"""plain: XLA's, or on CPUs ours (attention.cc); differentiable in forward mode too, as continuous-time objectives need.
cudnn: NVIDIA's fused kernel, half precision only, reverse mode only. auto: cudnn where it can run, else plain."""

Heads = Float[Array, "b s n d"]
"""Queries, keys or values: batch, position, head, width."""


def attend(
    thirds: Float[Array, "b s c3"], heads: int, implementation: Implementation = "auto"
) -> Float[Array, "b s c"]:
    """softmax(q k^T / sqrt(d)) v for every head, with the softmax in float32; q, k and v are thirds of the channels.

    On CPUs, in float32, by attention.cc, whose scores stay in the cache.
    """
    pixels, width = thirds.shape[1], thirds.shape[2] // 3 // heads
    if implementation != "cudnn" and kernels.suits(thirds, width) and kernels.suits(thirds, pixels):
        return _fused(thirds, heads=heads)
    query, key, value = _split(thirds, heads)
    if implementation == "cudnn" or (implementation == "auto" and _cudnn_runs(query)):
        return _joined(jax.nn.dot_product_attention(query, key, value, implementation="cudnn"))
    return _plain(thirds, heads=heads)


def _plain(thirds: Array, *, heads: int) -> Array:
    query, key, value = _split(thirds, heads)
    precision = product_precision(query.dtype)
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return _joined(jnp.einsum("bnqk,bknd->bqnd", weights.astype(value.dtype), value, precision=precision))


_fused = kernels.differentiable("cm_jax_attention", _plain, lambda x, *, heads: (*x.shape[:2], x.shape[2] // 3))


def _split(thirds: Array, heads: int) -> tuple[Heads, Heads, Heads]:
    b, s, _ = thirds.shape
    query, key, value = (part.reshape(b, s, heads, -1) for part in jnp.split(thirds, 3, axis=-1))
    return query, key, value


def _joined(heads: Heads) -> Array:
    return heads.reshape(*heads.shape[:2], -1)


def _cudnn_runs(query: Heads) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if not (half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128):
        return False
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()
