"""Softmax attention over the pixels of an image, plain or fused."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.networks.precision import product_precision

Implementation = Literal["auto", "plain", "cudnn"]
"""plain: XLA everywhere, differentiable in forward mode too (continuous-time objectives need that).
cudnn: NVIDIA's fused kernel, half precision only, reverse mode only. auto: cudnn where it can run, else plain."""

Heads = Float[Array, "b s n d"]
"""Queries, keys or values: batch, position, head, width."""


def attend(query: Heads, key: Heads, value: Heads, implementation: Implementation = "auto") -> Heads:
    """softmax(q k^T / sqrt(d)) v for every head, with the softmax in float32."""
    if implementation == "cudnn" or (implementation == "auto" and _cudnn_runs(query)):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    precision = product_precision(query.dtype)
    scores = jnp.einsum("bqnd,bknd->bnqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnqk,bknd->bqnd", weights.astype(value.dtype), value, precision=precision)


def _cudnn_runs(query: Heads) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if not (half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128):
        return False
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()
