"""Many images from one key: in batches, over all local devices, the same images whatever the batches were.

Image number i has its own key, fold_in(key, i), and from it come its label and all of its noise.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.samplers import Sampler
from cm_jax.samplers.base import Levels
from cm_jax.types import Images, Keys, Labels, NoiseSource, Params, normal_per_image

_LABEL, _NOISE = 0, 1
"""What is drawn from an image's key."""


@jax.jit
def image_keys(key: Key[Array, ""], numbers: Int[Array | np.ndarray, " b"]) -> Keys:
    """The keys of the images with these numbers."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def draw_labels(key: Key[Array, ""], count: int, classes: int) -> Int[np.ndarray, " b"]:
    """A uniform class for each of the first `count` images."""
    return np.asarray(_labels(key, np.arange(count), classes))


@functools.partial(jax.jit, static_argnums=2)
def _labels(key: Key[Array, ""], numbers: Int[Array | np.ndarray, " b"], classes: int) -> Int[Array, " b"]:
    def draw(image_key: Key[Array, ""]) -> Int[Array, ""]:
        return jax.random.randint(jax.random.fold_in(image_key, _LABEL), (), 0, classes)

    return jax.vmap(draw)(image_keys(key, numbers))


def noise_from(keys: Keys, shape: tuple[int, int, int]) -> NoiseSource:
    """Noise of image shape (h, w, c) for the images with these keys: draw i is fold_in(key, i)'s."""
    sources = jax.vmap(jax.random.fold_in, (0, None))(keys, _NOISE)
    return lambda index: normal_per_image(jax.vmap(jax.random.fold_in, (0, None))(sources, index), shape)


def draw_images(
    function: ConsistencyFunction, sampler: Sampler, params: Params, levels: Levels, keys: Keys, labels: Labels | None
) -> Images:
    """Images in [-1, 1] for a batch of keys: the whole way from key to image, to be compiled as one program."""
    draw = noise_from(keys, function.network.image_shape)
    return sampler(function.denoiser(params, labels), levels, draw)


def images_from_noise(
    function: ConsistencyFunction,
    sampler: Sampler,
    params: Params,
    levels: Levels,
    noise: Float[Array, "draws b h w c"],
    labels: Labels | None,
) -> Images:
    """As `draw_images`, from recorded standard normal noise, one entry per draw of the sampler."""
    return sampler(function.denoiser(params, labels), levels, lambda index: noise[index])


class Programs(NamedTuple):
    """One function, compiled for one device, and for several that share out the images."""

    one: Callable[..., Images]
    many: Callable[..., Images]


def compiled(program: Callable[..., Images], *, static: int, apart: int) -> Programs:
    """Of program(*static, params, levels, *apart): `static` arguments compiled in, `apart` ones with a row an image."""
    axes = (None,) * (static + 2) + (0,) * apart
    fixed = tuple(range(static))
    return Programs(
        jax.jit(program, static_argnums=fixed),
        jax.pmap(program, axis_name="devices", in_axes=axes, static_broadcasted_argnums=fixed),
    )


_drawing = compiled(draw_images, static=2, apart=2)
_from_noise = jax.jit(images_from_noise, static_argnums=(0, 1))


def default_batch_size(image_size: int) -> int:
    """Images per device and batch: 64 up to 64 pixels, and so that memory stays about the same above."""
    return max(1, 64 * 64**2 // max(image_size, 64) ** 2)


def generate(
    function: ConsistencyFunction,
    sampler: Sampler,
    params: Params,
    levels: Sequence[float],
    key: Key[Array, ""],
    count: int,
    labels: Int[np.ndarray, " n"] | None,
    *,
    batch_size: int,
    devices: Sequence[Any] | None = None,
) -> Iterator[Float[np.ndarray, "b h w c"]]:
    """Images 0 ... count - 1 in order, a batch at a time; only one batch is on the devices at once.

    `labels` has one class per image, or is None for an unconditional network. `batch_size` is the number of images
    drawn at once over all `devices` (by default the local ones), rounded up to a multiple of their number.
    """

    def rows(numbers: Int[np.ndarray, " b"]) -> tuple[Keys, Labels | None]:
        chosen = None if labels is None else jnp.asarray(labels[np.minimum(numbers, count - 1)].astype(np.int32))
        return image_keys(key, numbers), chosen

    return in_batches(
        _drawing, (function, sampler), params, levels, rows, count, batch_size=batch_size, devices=devices
    )


def in_batches(
    programs: Programs,
    static: tuple[Any, ...],
    params: Params,
    levels: Sequence[float],
    rows: Callable[[Int[np.ndarray, " b"]], tuple[Any, ...]],
    count: int,
    *,
    batch_size: int,
    devices: Sequence[Any] | None = None,
) -> Iterator[Float[np.ndarray, "b h w c"]]:
    """Images 0 ... count - 1 of a program in order, a batch at a time; only one batch is on the devices at once.

    `rows(numbers)` are the arguments of which every image has its own, with a row for each of these images. Numbers of
    `count` and more fill the last batch up, and what becomes of them is dropped.
    """
    devices = list(devices or jax.local_devices())
    batch_size = -(-min(batch_size, count) // len(devices)) * len(devices)
    walked = jnp.asarray(np.asarray(levels, np.float32))
    if len(devices) > 1:
        params = jax.device_put(params, NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec()))

    for start in range(0, count, batch_size):
        own = rows(np.arange(start, start + batch_size))
        if len(devices) == 1:
            images = programs.one(*static, params, walked, *own)
        else:
            apart = jax.tree.map(lambda a: a.reshape(len(devices), -1, *a.shape[1:]), own)
            images = programs.many(*static, params, walked, *apart)
        yield np.asarray(images).reshape(batch_size, *images.shape[-3:])[: count - start]


def replay(
    function: ConsistencyFunction,
    sampler: Sampler,
    params: Params,
    levels: Sequence[float],
    noise: Float[np.ndarray | Array, "draws b h w c"],
    labels: Int[np.ndarray, " b"] | None,
) -> Float[np.ndarray, "b h w c"]:
    """Images from recorded noise, in one batch."""
    chosen = None if labels is None else jnp.asarray(labels, jnp.int32)
    walked = jnp.asarray(levels, jnp.float32)
    return np.asarray(_from_noise(function, sampler, params, walked, jnp.asarray(noise, jnp.float32), chosen))
