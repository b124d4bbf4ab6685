"""Between two images: from the noise of one to the noise of the other, or from blends of both under one noise."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.samplers import Sampler
from cm_jax.samplers.base import Levels
from cm_jax.samplers.generation import compiled, image_keys, in_batches, noise_from
from cm_jax.types import Images, Keys, Labels, Params, per_image

_SMALLEST_ANGLE = 1e-4


def slerp(first: Images, second: Images, share: Float[Array, " b"]) -> Images:
    """(sin((1 - a) psi) z_1 + sin(a psi) z_2) / sin psi, psi the angle between z_1 and z_2 (CM, appendix D).

    Noise of standard normal law stays so, where a straight line would lose length half-way. Of parallel ones, the line.
    """
    one, two = (z.reshape(z.shape[0], -1) for z in (first, second))
    cosine = (one * two).sum(1) / (jnp.linalg.norm(one, axis=1) * jnp.linalg.norm(two, axis=1))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    flat = jnp.sin(angle) < _SMALLEST_ANGLE
    safe = jnp.where(flat, 1.0, angle)
    left = jnp.where(flat, 1 - share, jnp.sin((1 - share) * safe) / jnp.sin(safe))
    right = jnp.where(flat, share, jnp.sin(share * safe) / jnp.sin(safe))
    return per_image(left) * first + per_image(right) * second


def slerp_images(
    function: ConsistencyFunction,
    sampler: Sampler,
    params: Params,
    levels: Levels,
    first: Keys,
    second: Keys,
    shares: Float[Array, " b"],
    labels: Labels | None,
) -> Images:
    """What a sampler makes of every draw of noise between those of two keys: at the ends, their own images."""
    one, two = (noise_from(keys, function.network.image_shape) for keys in (first, second))
    return sampler(function.denoiser(params, labels), levels, lambda index: slerp(one(index), two(index), shares))


_programs = compiled(slerp_images, static=2, apart=4)


def slerp_all(
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
    devices: Sequence[Any] | None = None,
) -> Iterator[Float[np.ndarray, "n h w c"]]:
    """`frames` images from the first one of one key to the first one of another, both included, a batch at a time."""
    shares = np.linspace(0, 1, frames, dtype=np.float32)

    def rows(numbers: Int[np.ndarray, " n"]) -> tuple[Any, ...]:
        which = np.minimum(numbers, frames - 1)
        one, two = (image_keys(key, np.zeros_like(which)) for key in (first, second))
        return one, two, shares[which], None if labels is None else labels[which]

    return in_batches(
        _programs, (function, sampler), params, levels, rows, frames, batch_size=batch_size, devices=devices
    )


def blends(
    first: Float[Array | np.ndarray, "h w c"], second: Float[Array | np.ndarray, "h w c"], frames: int
) -> Float[np.ndarray, "n h w c"]:
    """(1 - a) first + a second, for a from 0 to 1: to begin from, as strokes, under one noise for all of them."""
    shares = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None, None]
    return (1 - shares) * np.asarray(first, np.float32) + shares * np.asarray(second, np.float32)
