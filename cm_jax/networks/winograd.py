"""3x3 convolutions with fewer multiplications, for CPUs: Winograd's minimal filtering, from kernels transformed once.

Four rows of output from six of input take six products where the direct form takes twelve, F(4, 3); two columns from
four take four instead of six, F(2, 3) (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016).
What is saved is paid in memory traffic, which grows with the image: columns are transformed on small images alone, and
otherwise convolved directly. Largest error of a layer, relative to its largest output: direct 1.7e-6, F(2, 3) both ways
1e-6, F(4, 3) by F(2, 3) 4e-6.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Filtering(NamedTuple):
    """F(m, 3): output = A^T (G kernel * B^T input), where * is element by element."""

    input: tuple[tuple[float, ...], ...]
    """B^T, [m + 2, m + 2]."""
    kernel: tuple[tuple[float, ...], ...]
    """G, [m + 2, 3]."""
    output: tuple[tuple[float, ...], ...]
    """A^T, [m, m + 2]."""


_TWO = Filtering(
    input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    kernel=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    output=((1, 1, 1, 0), (0, 1, -1, -1)),
)
_FOUR = Filtering(
    input=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    kernel=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    output=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
_BY_LENGTH = {len(filtering.kernel): filtering for filtering in (_TWO, _FOUR)}

_CACHED = 1_500_000
"""Values of a network's first layer in all images that it sees at once, up to which 32 MB of cache suffice."""

Transformed = Float[Array, "rows columns i o"]
"""A transformed kernel; its shape tells how: 6 or 4 rows, by F(4, 3) or F(2, 3); 4 columns, or 3 that are not."""


def form(size: int, channels_in: int, channels_out: int) -> tuple[int, int] | None:
    """(rows, columns) of the transformed kernel that is fastest on images of this size, None for the direct form.

    With fewer channels there is little to win, and a longer compilation (benchmarks/NOTES.md). The smallest images have
    the largest kernels, whose transforms are kept small.
    """
    if min(channels_in, channels_out) < 192:
        return None
    if size > 32:
        return (6, 3)
    return (6, 4) if size > 8 else (4, 4)


def transform(kernel: Float[Array, "3 3 i o"], rows: int, columns: int) -> Transformed:
    """G kernel G^T, in float32."""
    kernel = jnp.asarray(kernel, jnp.float32)
    taps = [_combined(weights, kernel) for weights in _BY_LENGTH[rows].kernel]
    if columns == 3:
        return jnp.stack(taps)
    return jnp.stack([jnp.stack([_combined(weights, row) for weights in _BY_LENGTH[columns].kernel]) for row in taps])


@functools.partial(jax.jit, static_argnums=1)
def transform_all(kernels: list[Array], forms: tuple[tuple[int, int], ...]) -> list[Transformed]:
    """Many kernels' transforms, in one program."""
    return [transform(kernel, *form) for kernel, form in zip(kernels, forms, strict=True)]


def images_at_once(batch: int, values: int) -> int:
    """The most images that divide a batch and stay in the cache; `values` is what the first layer makes of one."""
    return max(size for size in range(1, batch + 1) if batch % size == 0 and (size == 1 or size * values <= _CACHED))


def convolve(x: Float[Array, "b h w i"], kernel: Transformed) -> Float[Array, "b h w o"]:
    """3x3 convolution with one row of zeros on every side, stride 1, in float32; the kernel is from `transform`.

    Sizes that are no multiple of what is computed at once get more zeros, and the result is cut.
    """
    rows, columns, _, features = kernel.shape
    b, height, width, _ = x.shape
    vertical, across = _BY_LENGTH[rows], 1 if columns == 3 else columns - 2
    down = rows - 2
    margin = (0, 0) if columns == 3 else (1, 1 + -width % across)
    x = jnp.pad(x, ((0, 0), (1, 1 + -height % down), margin, (0, 0)))
    tall = -(-height // down)
    strips = _transformed(x, vertical, axis=1, tiles=tall)
    if columns == 3:
        products = [[_along_rows(strip, taps)] for strip, taps in zip(strips, kernel, strict=True)]
    else:
        products = _both_ways(strips, kernel, -(-width // across))
    # Columns within rows: [b, tiles down, rows of a tile, tiles across, columns of a tile, features].
    rows_of_tile = [
        jnp.stack([_combined(weights, parts) for parts in zip(*products, strict=True)], axis=3)
        for weights in vertical.output
    ]
    result = jnp.stack(rows_of_tile, axis=2).reshape(b, tall * down, -1, features)
    return result[:, :height, :width]


def _along_rows(x: Float[Array, "b h w i"], taps: Float[Array, "3 i o"]) -> Float[Array, "b h w o"]:
    """With a zero on either side, which XLA's convolution adds: without them it is slower on CPUs (NOTES.md)."""
    return jax.lax.conv_general_dilated(
        x, taps[None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST
    )


def _both_ways(strips: list[Array], kernel: Transformed, tiles: int) -> list[list[Array]]:
    """For each strip [b, h, w, i] its columns' parts [b, h, tiles, o]: the products are one batch."""
    rows, columns, channels, features = kernel.shape
    across = _BY_LENGTH[columns]
    b, height = strips[0].shape[:2]
    inputs = jnp.stack([part for strip in strips for part in _transformed(strip, across, axis=2, tiles=tiles)])
    products = jax.lax.dot_general(
        inputs.reshape(rows * columns, -1, channels),
        kernel.reshape(rows * columns, channels, features),
        (((2,), (1,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(rows, columns, b, height, tiles, features)
    return [[_combined(weights, line) for weights in across.output] for line in products]


def _transformed(x: Array, filtering: Filtering, *, axis: int, tiles: int) -> list[Array]:
    """B^T x along an axis: as many arrays as F(m, 3) has products, `tiles` long there."""
    step = len(filtering.output)
    reach = step * (tiles - 1) + 1
    parts = [jax.lax.slice_in_dim(x, at, at + reach, step, axis) for at in range(step + 2)]
    return [_combined(weights, parts) for weights in filtering.input]


def _combined(weights: tuple[float, ...], parts: Iterable[Array]) -> Array:
    """The weighted sum of the parts whose weight is not zero."""
    terms = [
        part if weight == 1 else np.float32(weight) * part
        for weight, part in zip(weights, parts, strict=True)
        if weight
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
