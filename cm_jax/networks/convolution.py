"""The 3x3 convolution, where nearly all of the work is: one function, so that it can be replaced in one place."""

import jax
from jaxtyping import Array, Float

from cm_jax.networks.precision import product_precision


def convolve_3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *, stride: int = 1, padding: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """3x3 convolution with `padding` rows of zeros on every side, in x's precision.

    The padding is PyTorch's: with stride 2 on even sizes it differs from XLA's "SAME", which pads (0, 1).
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=product_precision(x.dtype),
    )
