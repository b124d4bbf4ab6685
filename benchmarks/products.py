"""Operation count of a function from its trace: independent of the backend, without compiling or running it."""

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cm_jax import kernels


def products(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Operations of all convolutions and matrix products, by the dtype of the operands.

    A multiply-add counts as two operations. Multiplications with padding do not count, as in XLA's own count, which is
    not available on GPU. cuDNN attention is not counted: trace plain attention.
    """
    found: dict[str, float] = collections.defaultdict(float)
    with kernels.off():
        trace = jax.make_jaxpr(function)(*arguments)
    for dtype, operations in _walk(trace.jaxpr):
        found[dtype] += operations
    return dict(found)


def _walk(jaxpr: Any) -> Iterator[tuple[str, float]]:
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield _dtype(equation), 2.0 * equation.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            yield _dtype(equation), _convolution(equation)
        times = parameters["length"] if name == "scan" else 1
        for inner in _inner(parameters.values()):
            for dtype, operations in _walk(inner):
                yield dtype, times * operations


def _inner(values: Any) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _dtype(equation: Any) -> str:
    return str(np.dtype(equation.invars[0].aval.dtype))


def _convolution(equation: Any) -> float:
    parameters = equation.params
    numbers = parameters["dimension_numbers"]
    image, kernel = (variable.aval.shape for variable in equation.invars[:2])
    result = equation.outvars[0].aval.shape
    pairs = 1
    for axis, (stride, (before, _), dilation, kernel_dilation) in enumerate(
        zip(
            parameters["window_strides"],
            parameters["padding"],
            parameters["lhs_dilation"],
            parameters["rhs_dilation"],
            strict=True,
        )
    ):
        outputs, taps = (
            np.arange(shape[spec[2 + axis]]) for shape, spec in ((result, numbers.out_spec), (kernel, numbers.rhs_spec))
        )
        positions = outputs[:, None] * stride + taps * kernel_dilation - before
        last = (image[numbers.lhs_spec[2 + axis]] - 1) * dilation
        pairs *= int(((positions >= 0) & (positions <= last) & (positions % dilation == 0)).sum())
    batch, features = (result[numbers.out_spec[axis]] for axis in (0, 1))
    return 2.0 * pairs * batch * features * kernel[numbers.rhs_spec[1]]
