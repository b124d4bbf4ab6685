"""C++ functions as JAX primitives that differentiate in both modes, such as 3x3 convolution and matrix product."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jaxtyping import Array, Float

from cm_jax.kernels import building

Function = Callable[..., Any]
_HIGHEST = jax.lax.Precision.HIGHEST


def primitive(name: str, plain: Function, shapes: Callable[..., str], *, several: bool = False) -> Primitive:
    """A primitive that calls C++ function `name` on one CPU device and lowers `plain` elsewhere.

    shapes: function from settings to the shapes of arguments and results, such as "n i, i o -> n o".
    """
    result = Primitive(name)
    result.multiple_results = several
    result.def_impl(functools.partial(xla.apply_primitive, result))

    @result.def_abstract_eval
    def _(*args: Any, **settings: Any) -> Any:
        found = _result_shapes(shapes(**settings), [arg.shape for arg in args])
        results = [args[0].update(shape=shape) for shape in found]
        return results if several else results[0]

    by_xla = mlir.lower_fun(plain, multiple_results=several)

    def lower(context: mlir.LoweringRuleContext, *args: Any, **settings: Any) -> Any:
        # XLA cannot partition a custom call over devices, and the C++ functions divide by the number of images.
        avals: Any = context.avals_in
        partitioned = getattr(context.module_context.axis_context, "num_devices", 1) > 1
        empty = any(0 in aval.shape for aval in avals)
        if partitioned or empty or name not in building.TARGETS or not building.available():
            return by_xla(context, *args, **settings)
        attributes = {key: np.float32(value) if isinstance(value, float) else value for key, value in settings.items()}
        return jax.ffi.ffi_lowering(name)(context, *args, **attributes)

    mlir.register_lowering(result, by_xla)
    mlir.register_lowering(result, lower, platform="cpu")
    return result


def _result_shapes(shapes: str, found: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes of the results from those of the arguments. Raises ValueError for arguments that do not match `shapes`.

    The C++ functions would read beyond the ends of such arguments.
    """
    wanted, results = _axes(shapes)
    pairs = [pair for axes, shape in zip(wanted, found, strict=True) for pair in zip(axes, shape, strict=False)]
    sizes = {name: size // factor for (factor, name), size in pairs} | {"": 1}
    computed = [tuple(factor * sizes.get(name, 0) for factor, name in axes) for axes in (*wanted, *results)]
    if computed[: len(found)] != found:
        raise ValueError(f"Expected arrays of shapes {shapes.split(' ->')[0]}, got {', '.join(map(str, found))}.")
    return computed[len(found) :]


@functools.cache
def _axes(shapes: str) -> list[list[list[tuple[int, str]]]]:
    """Factor and name of each axis of the arguments, and of the results: (3, "c") for 3c, (3, "") for 3."""
    sides = [[re.findall(r"(?=\w)(\d*)([a-z]*)", array) for array in side.split(",")] for side in shapes.split("->")]
    return [[[(int(factor or 1), name) for factor, name in axes] for axes in side] for side in sides]


def _bind(function: Primitive, *args: Array, **settings: Any) -> Array:
    """`function` of arrays that vary over the same axes of a mesh, as `jax.shard_map` checks."""
    varying = [jax.typeof(arg).mat.varying for arg in args]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    alike = [jax.lax.pcast(arg, axes, to="varying") for arg, axes in zip(args, missing, strict=True)]
    return function.bind(*alike, **settings)


def differentiable(name: str, plain: Function, shapes: str) -> Function:
    """`plain(*arrays, **settings) -> array` computed by the C++ functions `name` and `name`_gradient.

    shapes: those of the arrays and the result, such as "b s 3c -> b s c". `name`_gradient maps the arrays and the
    result's cotangent to the arrays' cotangents. Forward mode and second derivatives use XLA's form of `plain`, apart
    from the primal value. All arrays have the batch as first axis, along which `plain` is independent.
    """

    def vjp_of_plain(*args: Array, **settings: Any) -> list[Array]:
        *arrays, seen = args
        return list(jax.vjp(functools.partial(plain, **settings), *arrays)[1](seen))

    def tangent_of_plain(*args: Array, **settings: Any) -> Array:
        half = len(args) // 2
        return jax.jvp(functools.partial(plain, **settings), args[:half], args[half:])[1]

    given, result = shapes.split(" -> ")
    function = primitive(name, plain, lambda **_: shapes)
    tangent = primitive(f"{name}_tangent", tangent_of_plain, lambda **_: f"{given}, {given} -> {result}")
    gradient = primitive(f"{name}_gradient", vjp_of_plain, lambda **_: f"{given}, {result} -> {given}", several=True)

    def jvp(primals: Any, tangents: Any, **settings: Any) -> Any:
        filled = map(ad.instantiate_zeros, tangents)
        return function.bind(*primals, **settings), tangent.bind(*primals, *filled, **settings)

    def transposed(seen: Any, *args: Any, **settings: Any) -> Any:
        half = len(args) // 2
        found = gradient.bind(*args[:half], ad.instantiate_zeros(seen), **settings)
        wanted = [ad.is_undefined_primal(each) for each in args[half:]]
        return [None] * half + [each if want else None for each, want in zip(found, wanted, strict=True)]

    ad.primitive_jvps[function] = jvp
    ad.primitive_transposes[tangent] = transposed
    for other, by_jax in ((tangent, tangent_of_plain), (gradient, vjp_of_plain)):
        ad.primitive_jvps[other] = functools.partial(_jvp_of_plain, by_jax)
    for each in (function, tangent, gradient):
        batching.primitive_batchers[each] = functools.partial(_map_batch, each)
    return functools.partial(_bind, function)


def _jvp_of_plain(plain: Function, primals: Any, tangents: Any, **settings: Any) -> Any:
    return jax.jvp(functools.partial(plain, **settings), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _map_batch(primitive_: Primitive, args: Any, axes: Any, **settings: Any) -> Any:
    """vmap rule: the mapped axis joins the batch axis."""
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    whole = [
        jnp.broadcast_to(arg, (size, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    ]
    batch = whole[0].shape[1]
    found = primitive_.bind(*[arg.reshape(size * batch, *arg.shape[2:]) for arg in whole], **settings)
    apart = [each.reshape(size, batch, *each.shape[1:]) for each in (found if primitive_.multiple_results else [found])]
    return (apart, [0] * len(apart)) if primitive_.multiple_results else (apart[0], 0)


def convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """3x3 convolution with stride 1 and zero padding 1, by the Winograd algorithm (convolution.cc).

    Largest error of a layer relative to its largest output: 4e-6 with 1536 channels, 1e-6 with 64 (XLA: 2e-6).
    """
    return _bind(_convolve_p, x, kernel, mirrored=False)


def multiply(x: Float[Array, "n i"], matrix: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x @ matrix in float32: XLA forward, product.cc for the gradient of the matrix.

    For that gradient XLA transposes the pixels first and runs at half its speed.
    """
    return _bind(_multiply_p, x, matrix)


# convolve, multiply and their gradients with respect to the second argument are bilinear, and the transpose of each is
# one of the four. So they are closed under differentiation.


def _plain_convolve(x: Array, kernel: Array, *, mirrored: bool) -> Array:
    """The XLA form. mirrored: with the mirrored kernel, whose channels are swapped, for gradients of images."""
    if mirrored:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=layout, precision=_HIGHEST)


def _plain_kernel_gradient(x: Array, dy: Array) -> Array:
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    return jax.linear_transpose(functools.partial(_plain_convolve, x, mirrored=False), kernel)(dy)[0]


_convolve_p = primitive(
    "cm_jax_convolve",
    _plain_convolve,
    lambda mirrored: "b h w o, 3 3 i o -> b h w i" if mirrored else "b h w i, 3 3 i o -> b h w o",
)
_kernel_gradient_p = primitive("cm_jax_kernel_gradient", _plain_kernel_gradient, lambda: "b h w i, b h w o -> 3 3 i o")
_multiply_p = primitive(
    "cm_jax_multiply", lambda x, matrix: jnp.dot(x, matrix, precision=_HIGHEST), lambda: "n i, i o -> n o"
)
_matrix_gradient_p = primitive(
    "cm_jax_product_gradient", lambda x, dy: jnp.dot(x.T, dy, precision=_HIGHEST), lambda: "n i, n o -> i o"
)

ad.defbilinear(
    _convolve_p,
    lambda dy, x, kernel, *, mirrored: _convolve_p.bind(dy, kernel, mirrored=not mirrored),
    lambda dy, x, kernel, *, mirrored: _kernel_gradient_p.bind(*((dy, x) if mirrored else (x, dy))),
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
    found = product.bind(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), matrix, **settings)
    return found.reshape(*x.shape[:2], *found.shape[1:]), 0


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
