"""Precision of matrix products."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def product_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """HIGHEST for float32, so that GPUs do not use TF32 and TPUs do not use bfloat16; None for other dtypes."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
