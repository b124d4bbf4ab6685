"""Matrix product of pixels as a JAX primitive: XLA forward, product.cc for the gradient of the matrix.

For that gradient XLA transposes the pixels first and runs at half its speed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from cm_jax.kernels.primitives import one_by_one, primitive


def multiply(x: Float[Array, "n i"], matrix: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x @ matrix in float32."""
    return _multiply_p.bind(x, matrix)


def _plain_multiply(x: Array, matrix: Array) -> Array:
    return jnp.dot(x, matrix, precision=jax.lax.Precision.HIGHEST)


def _plain_gradient(x: Array, dy: Array) -> Array:
    return _plain_multiply(x.T, dy)


_multiply_p = primitive("cm_jax_multiply", _plain_multiply, lambda x, matrix: (x.shape[0], matrix.shape[1]))
_gradient_p = primitive("cm_jax_product_gradient", _plain_gradient, lambda x, dy: (x.shape[1], dy.shape[1]))

ad.defbilinear(
    _multiply_p,
    lambda dy, x, matrix: _multiply_p.bind(dy, matrix.T),
    lambda dy, x, matrix: _gradient_p.bind(x, dy),
)
ad.defbilinear(
    _gradient_p,
    lambda matrix, x, dy: _multiply_p.bind(dy, matrix.T),
    lambda matrix, x, dy: _multiply_p.bind(x, matrix),
)


def _map_multiply(args: Any, axes: Any) -> Any:
    """vmap rule: mapped pixels become more pixels; mapped matrices are looped over."""
    (x, matrix), (x_axis, matrix_axis) = args, axes
    if matrix_axis is not None:
        return one_by_one(_multiply_p, args, axes)
    x = jnp.moveaxis(x, x_axis, 0)
    return _multiply_p.bind(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], -1), 0


batching.primitive_batchers[_multiply_p] = _map_multiply
batching.primitive_batchers[_gradient_p] = lambda args, axes: one_by_one(_gradient_p, args, axes)
