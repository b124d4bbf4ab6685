"""3x3 convolutions with fewer multiplications, for CPUs: Winograd's minimal filtering.

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

Matrix = tuple[tuple[float, ...], ...]


class Filtering(NamedTuple):
    """F(m, 3): output = A^T (G kernel * B^T input), where * is element by element."""

    input: Matrix
    """B^T, [m + 2, m + 2]."""
    kernel: Matrix
    """G, [m + 2, 3]."""
    output: Matrix
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

_CACHED = 1_100_000
"""Values of the input up to which all that is made of them fits into a cache of 32 MB."""

Form = tuple[int, int]
"""(rows, columns) of a transformed kernel: 6 or 4 rows, 4 columns, or 3 where columns are convolved directly."""

Transformed = Float[Array, "rows columns i o"]
"""A transformed kernel; its shape tells how: 6 or 4 rows, by F(4, 3) or F(2, 3); 4 columns, or 3 that are not."""


def form(size: int, channels_in: int, channels_out: int) -> Form | None:
    """(rows, columns) of the transformed kernel that is fastest on images of this size, None for the direct form.

    With fewer channels there is little to win, and a longer compilation (benchmarks/NOTES.md). The smallest images have
    the largest kernels, whose transforms are kept small.
    """
    if min(channels_in, channels_out) < 192:
        return None
    if size > 32:
        return (6, 3)
    return (6, 4) if size > 8 else (4, 4)


def training_form(size: int, channels_in: int, channels_out: int) -> Form | None:
    """As `form`, where the kernel changes at every step and its transform is part of the work."""
    channels = min(channels_in, channels_out)
    if channels < 192 or (size <= 8 and channels > 256):
        return None
    return (6, 4) if 16 < size <= 32 and channels > 256 else (6, 3)


def gradient_form(batch: int, size: int, channels_in: int, channels_out: int) -> Form | None:
    """(rows, columns) for `kernel_gradient`, None for the direct form."""
    channels = min(channels_in, channels_out)
    if channels < 192 or batch * size**2 < 256:
        return None
    return (6, 4) if channels < 512 else (4, 4)


def transform(kernel: Float[Array, "3 3 i o"], rows: int, columns: int) -> Transformed:
    """G kernel G^T, in float32."""
    kernel = jnp.asarray(kernel, jnp.float32)
    taps = [_combined(weights, kernel) for weights in _BY_LENGTH[rows].kernel]
    if columns == 3:
        return jnp.stack(taps)
    return jnp.stack([jnp.stack([_combined(weights, row) for weights in _BY_LENGTH[columns].kernel]) for row in taps])


@functools.partial(jax.jit, static_argnums=1)
def transform_all(kernels: list[Array], forms: tuple[Form, ...]) -> list[Transformed]:
    """Many kernels' transforms, in one program."""
    return [transform(kernel, *form) for kernel, form in zip(kernels, forms, strict=True)]


def convolve(x: Float[Array, "b h w i"], kernel: Transformed) -> Float[Array, "b h w o"]:
    """3x3 convolution with one row of zeros on every side, stride 1, in float32; the kernel is from `transform`.

    Sizes that are no multiple of what is computed at once get more zeros, and the result is cut. Large batches are
    convolved in parts, one after the other, of which what is between the steps stays in the cache.
    """
    batch, part = x.shape[0], _part(x.shape[0], x[0].size, _CACHED)
    if part == batch:
        return _convolve(x, kernel)
    parts = jax.lax.map(lambda images: _convolve(images, kernel), x.reshape(-1, part, *x.shape[1:]))
    return parts.reshape(batch, *parts.shape[2:])


def _part(batch: int, values: int, most: int) -> int:
    """Images of so many values that are convolved at once, a divisor of the batch."""
    return max(size for size in range(1, batch + 1) if batch % size == 0 and (size == 1 or size * values <= most))


def _convolve(x: Float[Array, "b h w i"], kernel: Transformed) -> Float[Array, "b h w o"]:
    rows, columns, _, features = kernel.shape
    b, height, width, _ = x.shape
    vertical, across = _BY_LENGTH[rows], 1 if columns == 3 else columns - 2
    down = rows - 2
    x = jnp.pad(x, ((0, 0), (1, 1 + -height % down), (1, 1 + -width % across), (0, 0)))
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


def kernel_gradient(
    x: Float[Array, "b h w i"], cotangent: Float[Array, "b h w o"], rows: int, columns: int
) -> Float[Array, "3 3 i o"]:
    """The gradient of sum(cotangent * convolution(x, kernel)) by the kernel: G^T ((B^T x B)(A cotangent A^T)) G.

    Both ways always, because products shared among few channels are what makes the direct form slow. Large batches go
    in parts, as in `convolve`.
    """
    batch, part = x.shape[0], _part(x.shape[0], max(x[0].size, cotangent[0].size), 2 * _CACHED)
    x, cotangent = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(cotangent)
    if part == batch:
        products = _tile_products(x, cotangent, rows, columns)
    else:
        nothing = [[jnp.zeros((x.shape[-1], cotangent.shape[-1]))] * columns] * rows
        parts = x.reshape(-1, part, *x.shape[1:]), cotangent.reshape(-1, part, *cotangent.shape[1:])

        def add(total: list[list[Array]], images: tuple[Array, Array]) -> tuple[list[list[Array]], None]:
            return jax.tree.map(jnp.add, total, _tile_products(*images, rows, columns)), None

        products, _ = jax.lax.scan(add, nothing, parts)
    to_columns, to_rows = (_transposed(_BY_LENGTH[length].kernel) for length in (columns, rows))
    lines = [[_combined(weights, line) for weights in to_columns] for line in products]
    return jnp.stack(
        [jnp.stack([_combined(weights, taps) for taps in zip(*lines, strict=True)]) for weights in to_rows]
    )


def _tile_products(x: Array, cotangent: Array, rows: int, columns: int) -> list[list[Array]]:
    """[rows][columns] of [i, o]: transformed tiles of x times transformed tiles of the cotangent, over all tiles."""
    vertical, across = _BY_LENGTH[rows], _BY_LENGTH[columns]
    _, height, width, _ = x.shape
    more_rows, more_columns = -height % (rows - 2), -width % (columns - 2)
    x = jnp.pad(x, ((0, 0), (1, 1 + more_rows), (1, 1 + more_columns), (0, 0)))
    cotangent = jnp.pad(cotangent, ((0, 0), (0, more_rows), (0, more_columns), (0, 0)))
    tall, wide = (height + more_rows) // (rows - 2), (width + more_columns) // (columns - 2)
    inputs = [
        _transformed(strip, across, axis=2, tiles=wide) for strip in _transformed(x, vertical, axis=1, tiles=tall)
    ]
    outputs = [_spread(strip, across, axis=2) for strip in _spread(cotangent, vertical, axis=1)]
    return [[_product(*tiles) for tiles in zip(*line, strict=True)] for line in zip(inputs, outputs, strict=True)]


def _product(x: Float[Array, "b h w i"], y: Float[Array, "b h w o"]) -> Float[Array, "i o"]:
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jax.lax.dot_general(flat_x, flat_y, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _spread(y: Array, filtering: Filtering, *, axis: int) -> list[Array]:
    """A y along an axis: the transpose of the output's transform."""
    step = len(filtering.output)
    parts = [jax.lax.slice_in_dim(y, at, None, step, axis) for at in range(step)]
    return [_combined(weights, parts) for weights in _transposed(filtering.output)]


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _along_rows(x: Float[Array, "b h w i"], taps: Float[Array, "3 i o"]) -> Float[Array, "b h w-2 o"]:
    return jax.lax.conv_general_dilated(
        x, taps[None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST
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
