"""Many images from one key: in batches, over all local devices, the same images whatever the batches were.

Image number i has its own key, fold_in(key, i), and from it come its label and all of its noise.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from cm_jax.arrays import Draw, Images, Keys, Labels, Params, normal_per_image
from cm_jax.consistency_function import ConsistencyFunction
from cm_jax.samplers import Sampler
from cm_jax.samplers.base import Levels

_LABEL, _NOISE = 0, 1
"""What is drawn from an image's key."""


def image_keys(key: Key[Array, ""], numbers: Int[np.ndarray, " b"]) -> Keys:
    """The keys of the images with these numbers."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def draw_labels(key: Key[Array, ""], count: int, classes: int) -> Int[np.ndarray, " b"]:
    """A uniform class for each of the first `count` images."""

    def draw(image_key: Key[Array, ""]) -> Int[Array, ""]:
        return jax.random.randint(jax.random.fold_in(image_key, _LABEL), (), 0, classes)

    return np.asarray(jax.vmap(draw)(image_keys(key, np.arange(count))))


def noise_from(keys: Keys, shape: tuple[int, int, int]) -> Draw:
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


_on_one_device = jax.jit(draw_images, static_argnums=(0, 1))
_from_noise = jax.jit(images_from_noise, static_argnums=(0, 1))
_on_many_devices = jax.pmap(
    draw_images, axis_name="devices", in_axes=(None, None, None, None, 0, 0), static_broadcasted_argnums=(0, 1)
)


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
    devices = list(devices or jax.local_devices())
    batch_size = -(-min(batch_size, count) // len(devices)) * len(devices)
    walked = jnp.asarray(levels, jnp.float32)
    if len(devices) > 1:
        params = jax.device_put(params, NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec()))

    for start in range(0, count, batch_size):
        numbers = np.arange(start, start + batch_size)
        keys = image_keys(key, numbers)
        chosen = None if labels is None else jnp.asarray(labels[np.minimum(numbers, count - 1)], jnp.int32)
        if len(devices) == 1:
            images = _on_one_device(function, sampler, params, walked, keys, chosen)
        else:
            apart = jax.tree.map(lambda a: a.reshape(len(devices), -1, *a.shape[1:]), (keys, chosen))
            images = _on_many_devices(function, sampler, params, walked, *apart)
        yield np.asarray(images).reshape(batch_size, *function.network.image_shape)[: count - start]


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
