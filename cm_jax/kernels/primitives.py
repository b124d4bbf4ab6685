"""C++ functions as JAX primitives that differentiate in both modes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from cm_jax.kernels import building

Function = Callable[..., Any]


def primitive(name: str, plain: Function, shapes: Function, *, several: bool = False) -> Primitive:
    """A primitive that calls C++ function `name` on one CPU device and lowers `plain` elsewhere.

    shapes: function from arguments and settings to the shape of the result (with `several`, a list of shapes).
    """
    result = Primitive(name)
    result.multiple_results = several
    result.def_impl(lambda *args, **settings: jax.jit(functools.partial(result.bind, **settings))(*args))

    @result.def_abstract_eval
    def _(*args: Any, **settings: Any) -> Any:
        found = shapes(*args, **settings)
        return [args[0].update(shape=shape) for shape in found] if several else args[0].update(shape=found)

    by_xla = mlir.lower_fun(plain, multiple_results=several)

    def lower(context: mlir.LoweringRuleContext, *args: Any, **settings: Any) -> Any:
        # XLA cannot partition a custom call over devices.
        partitioned = getattr(context.module_context.axis_context, "num_devices", 1) > 1
        if partitioned or name not in building.TARGETS or not building.available():
            return by_xla(context, *args, **settings)
        attributes = {key: np.float32(value) if isinstance(value, float) else value for key, value in settings.items()}
        return jax.ffi.ffi_lowering(name)(context, *args, **attributes)

    mlir.register_lowering(result, by_xla)
    mlir.register_lowering(result, lower, platform="cpu")
    return result


def differentiable(name: str, plain: Function, shape: Function) -> Function:
    """`plain(*arrays, **settings) -> array` computed by the C++ functions `name` and `name`_gradient.

    shape: function from arguments and settings to the shape of the result. `name`_gradient maps the arrays and the
    result's cotangent to the arrays' cotangents. Forward mode and second derivatives use XLA's form of `plain`, apart
    from the primal value. All arrays have the batch as first axis, along which `plain` is independent.
    """

    def vjp_of_plain(*args: Array, **settings: Any) -> list[Array]:
        *arrays, seen = args
        return list(jax.vjp(functools.partial(plain, **settings), *arrays)[1](seen))

    def tangent_of_plain(*args: Array, **settings: Any) -> Array:
        half = len(args) // 2
        return jax.jvp(functools.partial(plain, **settings), args[:half], args[half:])[1]

    def half_shape(*args: Any, **settings: Any) -> tuple[int, ...]:
        return shape(*args[: len(args) // 2], **settings)

    def shapes(*args: Any, **_: Any) -> list[tuple[int, ...]]:
        return [arg.shape for arg in args[:-1]]

    function = primitive(name, plain, shape)
    tangent = primitive(f"{name}_tangent", tangent_of_plain, half_shape)
    gradient = primitive(f"{name}_gradient", vjp_of_plain, shapes, several=True)

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
    return function.bind


def _jvp_of_plain(plain: Function, primals: Any, tangents: Any, **settings: Any) -> Any:
    filled = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(plain, **settings), tuple(primals), filled)


def _map_batch(primitive_: Primitive, args: Any, axes: Any, **settings: Any) -> Any:
    """vmap rule: the mapped axis joins the batch axis."""
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    whole = [
        jnp.broadcast_to(arg, (size, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    ]
    found = primitive_.bind(*[arg.reshape(-1, *arg.shape[2:]) for arg in whole], **settings)
    apart = [each.reshape(size, -1, *each.shape[1:]) for each in (found if primitive_.multiple_results else [found])]
    return (apart, [0] * len(apart)) if primitive_.multiple_results else (apart[0], 0)
