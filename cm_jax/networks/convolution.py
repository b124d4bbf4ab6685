"""The 3x3 convolution, which takes most of the compute."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax import kernels
from cm_jax.networks.precision import product_precision


def convolve_3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *, stride: int = 1, padding: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """3x3 convolution with `padding` rows of zeros on every side, in the precision of x.

    Padding follows PyTorch: with stride 2 and even sizes it differs from XLA's "SAME", which pads (0, 1).
    """
    if max(x.shape[1:3]) <= 2 and stride == padding == 1:
        return _tiny_convolution(x, kernel.astype(x.dtype))
    if stride == padding == 1 and min(x.shape[1:3]) > 2 and kernels.suits(x, kernel.shape[-1]):
        return kernels.convolve(x, kernel.astype(x.dtype))
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=product_precision(x.dtype),
    )


def _tiny_convolution(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """3x3 convolution of images of at most 2x2 pixels, as one matrix product.

    XLA on CPUs is slow for images smaller than the kernel: 240 ms instead of 8 ms in the last stage of LPIPS at 32
    pixels.
    """
    height, width = x.shape[1:3]
    rows = jnp.stack([kernel[1 - above : 1 - above + height] for above in range(height)])
    between = jnp.stack([rows[:, :, 1 - left : 1 - left + width] for left in range(width)], axis=1)
    return jnp.einsum("bhwi,yxhwio->byxo", x, between, precision=product_precision(x.dtype))
