"""Editing with a consistency model (CM, algorithm 4), and interpolation between images or their initial noise.

Editing is multistep sampling that restores the known part of an image at every step.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.arguments import as_images
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.guidance import AnyFunction
from cm_jax.editing.operators import Noisy, Operator
from cm_jax.errors import InputError, one_line
from cm_jax.parallelism import Parallelism
from cm_jax.samplers.base import Levels, NoiseLevelArgs, Sampler, levels_given
from cm_jax.samplers.batches import by_number
from cm_jax.samplers.consistency import multistep_sample
from cm_jax.samplers.generation import fold_in, image_keys, noise_from
from cm_jax.types import Denoiser, Images, Keys, Labels, NoiseSource, Params, per_image

_VARIANT = 2
"""fold_in value of the variants of an image; 0 and 1 are those of labels and noise in samplers/generation.py."""

_SMALLEST_ANGLE = 1e-4

EDIT_STEPS = 17
"""Default number of steps, as in OpenAI's CIFAR-10 notebook."""


def check_editable(config: ModelConfig) -> None:
    """Raise InputError unless the model is a consistency model."""
    if not config.distilled:
        raise InputError("Expected a consistency model for editing, got a denoiser; use a model distilled from it.")


def edit_levels(operator: Operator, shape: tuple[int, ...], **levels: Unpack[NoiseLevelArgs]) -> NoiseLevelArgs:
    """The noise levels, by default those of the operator for images of `shape`, or EDIT_STEPS steps from sigma_max."""
    if levels_given(levels):
        return levels
    sigmas = operator.default_sigmas(shape)
    return NoiseLevelArgs(steps=EDIT_STEPS) if sigmas is None else NoiseLevelArgs(sigmas=sigmas)


def check_images(
    images: Float[Array | np.ndarray, "..."], operator: Operator, shape: tuple[int, int, int]
) -> Float[np.ndarray, "b h w c"]:
    """The images as float32, if `operator` and a network with images of `shape` can process them; else InputError."""
    if not isinstance(operator, Operator):
        raise InputError(f"Expected an operator of cm_jax.editing, such as Luma(); got {one_line(operator)}.")
    array = np.asarray(as_images(images), np.float32)
    if array.ndim != 4 or array.shape[1:] != shape:
        raise InputError(
            f"Expected images [b, {', '.join(map(str, shape))}], got {list(array.shape)}; crop and resize them "
            "first, as `cm-jax edit` does."
        )
    if not np.isfinite(array).all():
        raise InputError("Expected finite images, got infinite or NaN values.")
    if not isinstance(operator, Noisy) and np.abs(array).max() > 1.001:
        raise InputError(f"Expected images in [-1, 1], got values up to {np.abs(array).max():.4g}.")
    operator.check(array.shape)
    return array


def edited_denoiser(denoiser: Denoiser, operator: Operator, images: Images) -> Denoiser:
    """(x, sigma) -> f(x, sigma), clipped to [-1, 1], with the known part of `images` restored."""
    return lambda x, sigma: operator.replace(images, jnp.clip(denoiser(x, sigma), -1, 1))


def edit(denoiser: Denoiser, operator: Operator, images: Images, levels: Levels, noise: NoiseSource) -> Images:
    """x = P y + s_0 z; then x_0 = f(x, s_i) with P y restored, and x = x_0 + sqrt(s_{i+1}^2 - sigma_min^2) z.

    As in OpenAI's implementation the result is not clipped, so that P x = P y holds for it.
    """
    start = operator.start(images, levels[0] * noise(0))
    return multistep_sample(edited_denoiser(denoiser, operator, images), start, levels, noise)


def edit_images(
    function: AnyFunction,
    params: Params,
    levels: Levels,
    keys: Keys,
    labels: Labels | None,
    operator: Operator,
    images: Images,
) -> Images:
    """Edits from keys and images, to be compiled as one program for each kind of operator."""
    noise = noise_from(keys, function.network.image_shape)
    return edit(function.denoiser(params, labels), operator, images, levels, noise)


def variant_keys(key: Key[Array, ""], images: int, variants: int) -> Keys:
    """A key for every variant of every image, grouped by image.

    The key of variant v of image i does not depend on the number of images or variants.
    """
    sources = fold_in(image_keys(key, np.arange(images)), _VARIANT)
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(sources, np.arange(variants))
    return each.reshape(-1)


def edit_batches(
    function: AnyFunction,
    operator: Operator,
    params: Params,
    levels: Sequence[float],
    keys: Keys,
    images: Float[np.ndarray, "i h w c"],
    labels: Int[np.ndarray, " i"] | None,
    batch_size: int,
    parallelism: Parallelism | None = None,
) -> Iterator[Float[np.ndarray, "n h w c"]]:
    """One edit for every key, in batches. `keys` holds the same number of keys for each image, grouped by image."""
    variants = len(keys) // len(images)
    known = jax.tree.map(np.asarray, operator)

    def rows(numbers: Int[np.ndarray, " n"]) -> tuple[Any, ...]:
        image = numbers // variants
        chosen = None if labels is None else labels[image]
        return keys[numbers], chosen, jax.tree.map(lambda array: array[image], known), images[image]

    shared = params, jnp.asarray(np.asarray(levels, np.float32))
    return by_number(
        edit_images, (function,), shared, rows, len(keys), batch_size, parallelism, name="the editing program"
    )


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
    function: AnyFunction,
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


def slerp_batches(
    function: AnyFunction,
    sampler: Sampler,
    params: Params,
    levels: Sequence[float],
    first: Key[Array, ""],
    second: Key[Array, ""],
    labels: Int[np.ndarray, " n"] | None,
    frames: int,
    batch_size: int,
    parallelism: Parallelism | None = None,
) -> Iterator[Float[np.ndarray, "n h w c"]]:
    """`frames` images from the first image of one key to the first image of another, both included, in batches."""
    weights = np.linspace(0, 1, frames, dtype=np.float32)

    def rows(numbers: Int[np.ndarray, " n"]) -> tuple[Any, ...]:
        one, two = (image_keys(key, np.zeros_like(numbers)) for key in (first, second))
        return one, two, weights[numbers], None if labels is None else labels[numbers]

    shared = params, jnp.asarray(np.asarray(levels, np.float32))
    return by_number(
        slerp_images, (function, sampler), shared, rows, frames, batch_size, parallelism, name="the sampler"
    )


def blend(
    first: Float[Array | np.ndarray, "h w c"], second: Float[Array | np.ndarray, "h w c"], frames: int
) -> Float[np.ndarray, "n h w c"]:
    """(1 - a) first + a second, with `frames` values of a from 0 to 1."""
    weights = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None, None]
    return (1 - weights) * np.asarray(first, np.float32) + weights * np.asarray(second, np.float32)
