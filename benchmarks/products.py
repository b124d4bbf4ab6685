"""What a function multiplies, read off its trace: the same on every backend, and nothing is compiled or run."""

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cm_jax import kernels


def products(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Operations (a multiplication and an addition are two) of all convolutions and matrix products, by the precision
    of what is multiplied. Multiplications with padding are not counted, as XLA does not count them.

    XLA's own count of a lowered program is not to be had on GPUs. A kernel of cuDNN is not seen: trace plain attention.
    """
    found: dict[str, float] = collections.defaultdict(float)
    with kernels.off():
        trace = jax.make_jaxpr(function)(*arguments)
    for precision, operations in _walk(trace.jaxpr):
        found[precision] += operations
    return dict(found)


def _walk(jaxpr: Any) -> Iterator[tuple[str, float]]:
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield _precision(equation), 2.0 * equation.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            yield _precision(equation), _convolution(equation)
        times = parameters["length"] if name == "scan" else 1
        for inner in _inner(parameters.values()):
            for precision, operations in _walk(inner):
                yield precision, times * operations


def _inner(values: Any) -> Iterator[Any]:
    """The programs among an operation's parameters."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _precision(equation: Any) -> str:
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
        places = outputs[:, None] * stride + taps * kernel_dilation - before
        last = (image[numbers.lhs_spec[2 + axis]] - 1) * dilation
        pairs *= int(((places >= 0) & (places <= last) & (places % dilation == 0)).sum())
    batch, features = (result[numbers.out_spec[place]] for place in (0, 1))
    return 2.0 * pairs * batch * features * kernel[numbers.rhs_spec[1]]
