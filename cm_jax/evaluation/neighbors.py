"""Nearest training images: whether a model memorized the images that it was trained on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from cm_jax.diffusion.losses import Perceptual
from cm_jax.errors import InputError
from cm_jax.evaluation.metrics import squared_distances
from cm_jax.feature_networks.lpips import TAPS, vgg16_features
from cm_jax.types import Params

_BATCH = 64
_LARGE = 512
"""Images whose embeddings are kept at once: 0.5 GB for LPIPS of 32 x 32 pixels."""


class Neighbors(NamedTuple):
    """The nearest reference of each image, and its distance."""

    indices: Int[np.ndarray, " b"]
    distances: Float[np.ndarray, " b"]


def nearest(
    images: UInt8[np.ndarray, "b _ _ _"], references: UInt8[np.ndarray, "n _ _ _"], lpips: Params | None = None
) -> Neighbors:
    """The nearest reference of each image.

    The distance is the root mean square difference of the 8-bit values, or LPIPS (RGB, max pooling, no resizing) with
    `lpips`, the weights of `LPIPS().load_weights()`. Raises InputError for images of different sizes and
    for none.
    """
    if images.shape[1:] != references.shape[1:] or not len(images) or not len(references):
        found = f"got {list(images.shape)} and {list(references.shape)}"
        raise InputError(f"Expected images and references of one size, at least one of each, {found}.")
    parts = [_nearest(images[start : start + _LARGE], references, lpips) for start in range(0, len(images), _LARGE)]
    return Neighbors(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _nearest(images: np.ndarray, references: np.ndarray, lpips: Params | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices and distances of the nearest references."""
    embed: Callable[[Any], Any] = _pixels if lpips is None else lambda batch: _perceptual(lpips, jnp.asarray(batch))
    points = _batches(embed, images)
    indices, squares = np.zeros(len(images), int), np.full(len(images), np.inf)
    for start in range(0, len(references), _BATCH):
        others = _batches(embed, references[start : start + _BATCH])
        for rows, distances in squared_distances(points, others):
            best = distances.argmin(1)
            found = distances[np.arange(len(best)), best]
            indices[rows] = np.where(found < squares[rows], start + best, indices[rows])
            squares[rows] = np.minimum(found, squares[rows])
    return indices, squares if lpips is not None else np.sqrt(squares / points.shape[1])


def _batches(embed: Callable[[Any], Any], images: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b d"]:
    parts = [np.asarray(embed(images[start : start + _BATCH])) for start in range(0, len(images), _BATCH)]
    return np.concatenate(parts).astype(np.float64)


def _pixels(images: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b d"]:
    return images.reshape(len(images), -1).astype(np.float64)


@jax.jit
def _perceptual(lpips: Params, images: UInt8[jax.Array, "b h w c"]) -> Float[jax.Array, "b d"]:
    features = functools.partial(vgg16_features, lpips["vgg16"])
    return Perceptual(features, [lpips["heads"][tap] for tap in TAPS]).embed(jnp.float32(images) / 127.5 - 1)
