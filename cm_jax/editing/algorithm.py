"""The one loop that edits (CM, algorithm 4): the sampler of a consistency function, with what is known put back."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.editing.operators import Noisy, Operator
from cm_jax.errors import InputError
from cm_jax.samplers.base import Levels
from cm_jax.samplers.consistency import multistep_sample
from cm_jax.samplers.generation import compiled, image_keys, in_batches, noise_from
from cm_jax.types import Denoiser, Images, Keys, Labels, NoiseSource, Params

_VARIANT = 2
"""What is drawn from an image's key, beside its label and its noise (0 and 1, in generation.py)."""

EDIT_STEPS = 17
"""Steps where no levels are asked for: those of the original's notebook on CIFAR-10."""
_SLACK = 1e-3


def checked_images(
    images: Float[Array | np.ndarray, "..."], operator: Operator, shape: tuple[int, int, int]
) -> Float[np.ndarray, "b h w c"]:
    """Images that an operator can be applied to, of the network's shape. Raises InputError for any others."""
    given = np.asarray(images)
    if given.dtype.kind != "f":
        raise InputError(f"Images must be float32 in [-1, 1], got {given.dtype}: of 8 bits, take images / 127.5 - 1.")
    if given.ndim != 4 or not len(given) or given.shape[1:] != shape:
        raise InputError(
            f"Images to edit are {list(given.shape)}, and this model's are [b, {', '.join(map(str, shape))}]: "
            "fit them first, as the command `edit` does."
        )
    if not np.isfinite(given).all():
        raise InputError("Images to edit must be finite: some numbers are not.")
    if not isinstance(operator, Noisy) and np.abs(given).max() > 1 + _SLACK:
        raise InputError(f"Images to edit lie in [-1, 1]; these go to {np.abs(given).max():.4g}, beyond 1.")
    operator.check(given.shape)
    return given.astype(np.float32)


def edited(denoiser: Denoiser, operator: Operator, images: Images) -> Denoiser:
    """(x, sigma) -> f(x, sigma), clipped, with what the operator knows of `images` put back."""
    return lambda x, sigma: operator.replace(images, jnp.clip(denoiser(x, sigma), -1, 1))


def edit(denoiser: Denoiser, operator: Operator, images: Images, levels: Levels, draw: NoiseSource) -> Images:
    """x = P y + s_0 z; then x_0 = f(x, s_i) with P y put back, and x = x_0 + sqrt(s_{i+1}^2 - sigma_min^2) z.

    The end is not clipped, as in the original: P x = P y holds there, and would not after it.
    """
    start = operator.start(images, levels[0] * draw(0))
    return multistep_sample(edited(denoiser, operator, images), start, levels, draw)


def edit_images(
    function: ConsistencyFunction,
    params: Params,
    levels: Levels,
    keys: Keys,
    labels: Labels | None,
    operator: Operator,
    images: Images,
) -> Images:
    """The whole way from images and keys to edits, to be compiled as one program for every kind of operator."""
    draw = noise_from(keys, function.network.image_shape)
    return edit(function.denoiser(params, labels), operator, images, levels, draw)


_programs = compiled(edit_images, static=1, apart=4)


def variant_keys(key: Key[Array, ""], images: int, variants: int) -> Keys:
    """A key for every variant of every image, those of an image one after the other.

    That of variant v of image i depends on neither number.
    """
    sources = jax.vmap(jax.random.fold_in, (0, None))(image_keys(key, np.arange(images)), _VARIANT)
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(sources, np.arange(variants))
    return each.reshape(-1)


def edit_all(
    function: ConsistencyFunction,
    operator: Operator,
    params: Params,
    levels: Sequence[float],
    keys: Keys,
    images: Float[np.ndarray, "i h w c"],
    labels: Int[np.ndarray, " i"] | None,
    *,
    batch_size: int,
    devices: Sequence[Any] | None = None,
) -> Iterator[Float[np.ndarray, "n h w c"]]:
    """An edit for every key, a batch at a time: as many for each image, those of an image one after the other."""
    variants, last = len(keys) // len(images), len(keys) - 1
    known = jax.tree.map(np.asarray, operator)

    def rows(numbers: Int[np.ndarray, " n"]) -> tuple[Any, ...]:
        numbers = np.minimum(numbers, last)
        which = numbers // variants
        chosen = None if labels is None else labels[which]
        return keys[numbers], chosen, jax.tree.map(lambda array: array[which], known), images[which]

    return in_batches(_programs, (function,), params, levels, rows, len(keys), batch_size=batch_size, devices=devices)
