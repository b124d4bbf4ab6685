"""Sampling many images from one key, in batches on the devices of this process.

Image i has the key fold_in(key, i), which determines its label and its noise: images do not depend on the batch size.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.diffusion.guidance import AnyFunction
from cm_jax.errors import check_int
from cm_jax.parallelism import Parallelism, choose_for_images
from cm_jax.samplers.base import Levels, Sampler
from cm_jax.samplers.batches import by_number
from cm_jax.types import Images, Keys, Labels, NoiseSource, Params, normal_per_image

_LABEL, _NOISE = 0, 1
"""What is derived from an image's key."""

fold_in = jax.vmap(jax.random.fold_in, (0, None))
"""(keys, number) -> one new key from each key."""


@jax.jit
def image_keys(key: Key[Array, "*n"], numbers: Int[Array | np.ndarray, " b"]) -> Keys:
    """The keys of the images with these numbers; with several keys, image i is the first one of key i."""
    if key.ndim:
        return fold_in(key[numbers], 0)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def sample_labels(key: Key[Array, "*n"], count: int, classes: int) -> Int[np.ndarray, " b"]:
    """Uniform random classes for images 0 ... count - 1."""
    return np.asarray(_labels(key, np.arange(count), classes))


@functools.partial(jax.jit, static_argnums=2)
def _labels(key: Key[Array, "*n"], numbers: Int[Array | np.ndarray, " b"], classes: int) -> Int[Array, " b"]:
    keys = fold_in(image_keys(key, numbers), _LABEL)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, classes, np.int32))(keys)


def noise_from(keys: Keys, shape: tuple[int, int, int]) -> NoiseSource:
    """Noise of shape (h, w, c) for the images with these keys; sample i has the key fold_in(key, i)."""
    sources = fold_in(keys, _NOISE)
    return lambda index: normal_per_image(fold_in(sources, index), shape)


def sample(
    function: AnyFunction,
    sampler: Sampler,
    params: Params,
    levels: Levels | Sequence[float],
    keys: Keys,
    labels: Labels | None = None,
) -> Images:
    """Images in [-1, 1], one for each key: a pure function for use inside jit, vmap and grad.

    function: model.config.function. levels: descending, with the final level, as `model.plan(steps=2)` chooses them
    and its sampler. labels: one class per image; None for an unconditional network. With keys = image_keys(key,
    numbers) the images are those of `Model.sample(key)`.
    """
    noise = noise_from(keys, function.network.image_shape)
    return sampler(function.denoiser(params, labels), jnp.asarray(levels, jnp.float32), noise)


def images_from_noise(
    function: AnyFunction,
    sampler: Sampler,
    params: Params,
    levels: Levels,
    noise: Float[Array, "samples b h w c"],
    labels: Labels | None,
) -> Images:
    """The same from recorded standard normal noise, one entry per noise sample of the sampler."""
    return sampler(function.denoiser(params, labels), levels, lambda index: noise[index])


_from_noise = jax.jit(images_from_noise, static_argnums=(0, 1))


def default_batch_size(shape: tuple[int, ...]) -> int:
    """Images per device and batch: 64 up to 64 x 64 pixels, fewer above so that memory stays about the same."""
    return max(1, 64 * 64**2 // max(shape[0] * shape[1], 64**2))


def batching(
    batch_size: int | None, shape: tuple[int, ...], parallelism: Parallelism | None
) -> tuple[int, Parallelism]:
    """(images per batch over all devices, devices), checked or chosen by default."""
    parallelism = parallelism or choose_for_images()
    if batch_size is None:
        return default_batch_size(shape) * len(parallelism.devices), parallelism
    return check_int("batch_size", batch_size, 1, 10**6), parallelism


def generate(
    function: AnyFunction,
    sampler: Sampler,
    params: Params,
    levels: Sequence[float],
    key: Key[Array, "*n"],
    count: int,
    labels: Int[np.ndarray, " n"] | None,
    batch_size: int,
    parallelism: Parallelism | None = None,
    *,
    first: int = 0,
) -> Iterator[Float[np.ndarray, "b h w c"]]:
    """Images first ... count - 1 in order, one batch at a time.

    `key`: one for all images, or `count` keys, of each of which this is the first image. `labels`: one class per image;
    None for an unconditional network. `batch_size` and `parallelism` as in `by_number`.
    """

    def rows(numbers: Int[np.ndarray, " b"]) -> tuple[Keys, Labels | None]:
        return image_keys(key, numbers), None if labels is None else jnp.asarray(labels[numbers].astype(np.int32))

    shared = params, jnp.asarray(np.asarray(levels, np.float32))
    static, batching = (function, sampler), (count, batch_size, parallelism)
    return by_number(sample, static, shared, rows, *batching, name="the sampler", first=first)


def replay(
    function: AnyFunction,
    sampler: Sampler,
    params: Params,
    levels: Sequence[float],
    noise: Float[np.ndarray | Array, "samples b h w c"],
    labels: Int[np.ndarray, " b"] | None,
) -> Float[np.ndarray, "b h w c"]:
    """Images from recorded noise, in one batch, on one device."""
    chosen = None if labels is None else jnp.asarray(labels, jnp.int32)
    arrays = jnp.asarray(levels, jnp.float32), jnp.asarray(noise, jnp.float32)
    return np.asarray(_from_noise(function, sampler, params, *arrays, chosen))
