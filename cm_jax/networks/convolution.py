"""The 3x3 convolution, where nearly all of the work is, and its derivatives: each by the way that is fastest.

On a CPU, in float32, where channels are many, Winograd's forms are faster for outputs and for gradients of kernels
(networks/winograd.py, benchmarks/NOTES.md); everywhere else it is XLA's convolution.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cm_jax.networks import winograd
from cm_jax.networks.precision import product_precision

Method = Literal["auto", "direct"]
"""How 3x3 convolutions are computed: by the fastest way for their shape on this machine, or directly always."""


def convolve_3x3(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "3 3 i o"],
    *,
    stride: int = 1,
    padding: int = 1,
    method: Method = "direct",
) -> Float[Array, "b h2 w2 o"]:
    """3x3 convolution with `padding` rows of zeros on every side, in x's precision.

    The padding is PyTorch's: with stride 2 on even sizes it differs from XLA's "SAME", which pads (0, 1).
    """
    quick = method == "auto" and stride == padding == 1 and x.dtype == jnp.float32 and jax.default_backend() == "cpu"
    if quick:
        size, channels = max(x.shape[1:3]), kernel.shape[2:]
        output, gradient = winograd.training_form(size, *channels), winograd.gradient_form(len(x), size, *channels)
        if output or gradient:
            return _quick(x, jnp.asarray(kernel, jnp.float32), output, gradient)
    return _direct(x, kernel, stride, padding)


def _direct(x: Array, kernel: Array, stride: int = 1, padding: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=product_precision(x.dtype),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _quick(x: Array, kernel: Array, output: winograd.Form | None, gradient: winograd.Form | None) -> Array:
    return winograd.convolve(x, winograd.transform(kernel, *output)) if output else _direct(x, kernel)


@functools.partial(_quick.defjvp, symbolic_zeros=True)
def _derivative(output: winograd.Form | None, gradient: winograd.Form | None, primals: Any, tangents: Any) -> Any:
    """conv(x', kernel) + conv(x, kernel'), where the second is written as the transpose of the kernel's gradient.

    So reverse mode, which transposes it once more, computes that gradient; x' is convolved directly in both modes.
    """
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    y = _quick(x, kernel, output, gradient)
    tangent = jnp.zeros_like(y)
    if not isinstance(x_tangent, SymbolicZero):
        tangent = _direct(x_tangent, kernel)
    if not isinstance(kernel_tangent, SymbolicZero):
        if gradient:
            (moved,) = jax.linear_transpose(lambda cotangent: winograd.kernel_gradient(x, cotangent, *gradient), y)(
                kernel_tangent
            )
        else:
            moved = _direct(x, kernel_tangent)
        tangent = tangent + moved
    return y, tangent
