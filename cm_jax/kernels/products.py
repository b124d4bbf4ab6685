"""The bilinear functions of convolution.cc and product.cc as JAX primitives: 3x3 convolution and matrix product.

Each function and its gradient with respect to the second argument are bilinear, and the transpose of each is one of the
two. So they are closed under differentiation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from cm_jax.kernels.primitives import primitive

_HIGHEST = jax.lax.Precision.HIGHEST


def convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """3x3 convolution with stride 1 and zero padding 1, by the Winograd algorithm (convolution.cc).

    Largest error of a layer relative to its largest output: 4e-6 with 1536 channels, 1e-6 with 64 (XLA: 2e-6).
    """
    return _convolve_p.bind(x, kernel, mirrored=False)


def multiply(x: Float[Array, "n i"], matrix: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x @ matrix in float32: XLA forward, product.cc for the gradient of the matrix.

    For that gradient XLA transposes the pixels first and runs at half its speed.
    """
    return _multiply_p.bind(x, matrix)


def _plain_convolve(x: Array, kernel: Array, *, mirrored: bool) -> Array:
    """The XLA form. mirrored: with the mirrored kernel, whose channels are swapped, for gradients of images."""
    if mirrored:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers, precision=_HIGHEST
    )


def _plain_kernel_gradient(x: Array, dy: Array) -> Array:
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    return jax.linear_transpose(functools.partial(_plain_convolve, x, mirrored=False), kernel)(dy)[0]


def _convolved_shape(x: Any, kernel: Any, *, mirrored: bool) -> tuple[int, ...]:
    return (*x.shape[:3], kernel.shape[2 if mirrored else 3])


_convolve_p = primitive("cm_jax_convolve", _plain_convolve, _convolved_shape)
_kernel_gradient_p = primitive(
    "cm_jax_kernel_gradient", _plain_kernel_gradient, lambda x, dy: (3, 3, x.shape[3], dy.shape[3])
)
_multiply_p = primitive(
    "cm_jax_multiply",
    lambda x, matrix: jnp.dot(x, matrix, precision=_HIGHEST),
    lambda x, matrix: (x.shape[0], matrix.shape[1]),
)
_matrix_gradient_p = primitive(
    "cm_jax_product_gradient",
    lambda x, dy: jnp.dot(x.T, dy, precision=_HIGHEST),
    lambda x, dy: (x.shape[1], dy.shape[1]),
)


def _kernels_gradient(dy: Array, x: Array, kernel: Any, *, mirrored: bool) -> Array:
    return _kernel_gradient_p.bind(dy, x) if mirrored else _kernel_gradient_p.bind(x, dy)


ad.defbilinear(
    _convolve_p,
    lambda dy, x, kernel, *, mirrored: _convolve_p.bind(dy, kernel, mirrored=not mirrored),
    _kernels_gradient,
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda kernel, x, dy: _convolve_p.bind(dy, kernel, mirrored=True),
    lambda kernel, x, dy: _convolve_p.bind(x, kernel, mirrored=False),
)
ad.defbilinear(
    _multiply_p,
    lambda dy, x, matrix: _multiply_p.bind(dy, matrix.T),
    lambda dy, x, matrix: _matrix_gradient_p.bind(x, dy),
)
ad.defbilinear(
    _matrix_gradient_p,
    lambda matrix, x, dy: _multiply_p.bind(dy, matrix.T),
    lambda matrix, x, dy: _multiply_p.bind(x, matrix),
)


def _map_first(product: Primitive, args: Any, axes: Any, **settings: Any) -> Any:
    """vmap rule: mapped images or pixels become a larger batch; mapped kernels or matrices are looped over."""
    (x, matrix), (x_axis, matrix_axis) = args, axes
    if matrix_axis is not None:
        return _one_by_one(product, args, axes, **settings)
    x = jnp.moveaxis(x, x_axis, 0)
    return product.bind(x.reshape(-1, *x.shape[2:]), matrix, **settings).reshape(*x.shape[:-1], -1), 0


def _one_by_one(product: Primitive, args: Any, axes: Any, **settings: Any) -> Any:
    """vmap rule: a loop over the mapped axis."""
    mapped = {i: jnp.moveaxis(args[i], axis, 0) for i, axis in enumerate(axes) if axis is not None}

    def one(some: dict[int, Array]) -> Any:
        return product.bind(*[some.get(i, arg) for i, arg in enumerate(args)], **settings)

    return jax.lax.map(one, mapped), 0


for _p in (_convolve_p, _multiply_p):
    batching.primitive_batchers[_p] = functools.partial(_map_first, _p)
for _p in (_kernel_gradient_p, _matrix_gradient_p):
    batching.primitive_batchers[_p] = functools.partial(_one_by_one, _p)
