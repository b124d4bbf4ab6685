"""Interpolation between two images: of their initial noise, or of the images themselves, edited with the same noise."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.samplers import Sampler
from cm_jax.samplers.base import Levels
from cm_jax.samplers.batches import by_number, compile_programs, in_batches, multiple_of
from cm_jax.samplers.generation import image_keys, noise_from
from cm_jax.types import Images, Keys, Labels, Params, per_image

_SMALLEST_ANGLE = 1e-4


def slerp(first: Images, second: Images, weight: Float[Array, " b"]) -> Images:
    """(sin((1 - a) psi) z_1 + sin(a psi) z_2) / sin psi, with psi the angle between z_1 and z_2 (CM, appendix D).

    Interpolated standard normal noise is standard normal; linear interpolation would reduce its variance. Parallel
    inputs are interpolated linearly.
    """
    one, two = (z.reshape(z.shape[0], -1) for z in (first, second))
    cosine = (one * two).sum(1) / (jnp.linalg.norm(one, axis=1) * jnp.linalg.norm(two, axis=1))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    parallel = jnp.sin(angle) < _SMALLEST_ANGLE
    safe = jnp.where(parallel, 1.0, angle)
    left = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * safe) / jnp.sin(safe))
    right = jnp.where(parallel, weight, jnp.sin(weight * safe) / jnp.sin(safe))
    return per_image(left) * first + per_image(right) * second


def slerp_images(
    function: ConsistencyFunction,
    sampler: Sampler,
    params: Params,
    levels: Levels,
    first: Keys,
    second: Keys,
    weights: Float[Array, " b"],
    labels: Labels | None,
) -> Images:
    """Images from noise interpolated between that of two keys; the ends are the images of the keys themselves."""
    one, two = (noise_from(keys, function.network.image_shape) for keys in (first, second))
    return sampler(function.denoiser(params, labels), levels, lambda index: slerp(one(index), two(index), weights))


_programs = compile_programs(slerp_images, static=2, shared=2, per_image=4)


def slerp_batches(
    function: ConsistencyFunction,
    sampler: Sampler,
    params: Params,
    levels: Sequence[float],
    first: Key[Array, ""],
    second: Key[Array, ""],
    labels: Int[np.ndarray, " n"] | None,
    *,
    frames: int,
    batch_size: int,
) -> Iterator[Float[np.ndarray, "n h w c"]]:
    """`frames` images from the first image of one key to the first image of another, both included, in batches."""
    weights = np.linspace(0, 1, frames, dtype=np.float32)

    def rows(numbers: Int[np.ndarray, " n"]) -> tuple[Any, ...]:
        one, two = (image_keys(key, np.zeros_like(numbers)) for key in (first, second))
        return one, two, weights[numbers], None if labels is None else labels[numbers]

    devices = jax.local_devices()
    size = multiple_of(devices, min(batch_size, frames))
    shared = params, jnp.asarray(np.asarray(levels, np.float32))
    return in_batches(_programs, (function, sampler), shared, by_number(rows, frames, size), devices)


def blend(
    first: Float[Array | np.ndarray, "h w c"], second: Float[Array | np.ndarray, "h w c"], frames: int
) -> Float[np.ndarray, "n h w c"]:
    """(1 - a) first + a second, with `frames` values of a from 0 to 1."""
    weights = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None, None]
    return (1 - weights) * np.asarray(first, np.float32) + weights * np.asarray(second, np.float32)
