"""The 3x3 convolution, where nearly all of the work is: one function, so that it can be replaced in one place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax import kernels
from cm_jax.networks.precision import product_precision


def convolve_3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *, stride: int = 1, padding: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """3x3 convolution with `padding` rows of zeros on every side, in x's precision.

    The padding is PyTorch's: with stride 2 on even sizes it differs from XLA's "SAME", which pads (0, 1).
    """
    if max(x.shape[1:3]) <= 2 and stride == padding == 1:
        return _among_all_pixels(x, kernel.astype(x.dtype))
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


def _among_all_pixels(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """The same for images of at most 2x2 pixels: every pixel sees every other, so that it is one matrix product.

    On CPUs XLA has only its slowest convolution for images that are smaller than the kernel: 240 ms in place of 8 in
    the last stage of LPIPS at 32 pixels.
    """
    height, width = x.shape[1:3]
    rows = jnp.stack([kernel[1 - above : 1 - above + height] for above in range(height)])
    between = jnp.stack([rows[:, :, 1 - left : 1 - left + width] for left in range(width)], axis=1)
    return jnp.einsum("bhwi,yxhwio->byxo", x, between, precision=product_precision(x.dtype))
