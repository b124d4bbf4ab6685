"""Matrix products over the channel axis."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax import kernels
from cm_jax.networks.precision import product_precision


def multiply(x: Float[Array, "... i"], matrix: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """x @ matrix in the precision of x."""
    if x.ndim > 2 and kernels.suits(x, matrix.shape[-1]):
        return kernels.multiply(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], -1)
    return jnp.dot(x, matrix, precision=product_precision(x.dtype))
