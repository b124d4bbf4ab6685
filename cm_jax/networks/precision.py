"""Compute precision: one setting, and what it means for products."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Precision = Literal["float32", "bfloat16", "float16"]


def product_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """How to multiply: float32 means float32 on every machine (GPUs would take TF32, TPUs bfloat16, by themselves)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
