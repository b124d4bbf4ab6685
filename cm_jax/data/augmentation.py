"""Augmentation of training images whose parameters the network takes as input, so that samples do not show it."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cm_jax.errors import InputError
from cm_jax.types import Images, Keys

_LOBES = 3
"""Of the Lanczos kernel."""

Matrix = Float[Array, "3 3"]
"""A map of the plane in pixels from the center of the image, (x, y, 1), with y downward."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random flips, scaling, rotation, anisotropic scaling and translation of every image (EDM, appendix F.2).

    A network with augment_dim=9 takes the parameters as input, in the order of EDM's published networks. They are zero
    at sampling. Images are resampled with a Lanczos kernel and continued by reflection at their borders. A strength of
    0 turns a map off. Raises InputError for a probability outside [0, 1] and for a negative strength.
    """

    probability: float = 0.12
    """Probability of each map but the horizontal flip, which is applied to every second image."""
    x_flip: bool = True
    """Flip every second image horizontally."""
    y_flip: bool = True
    """Flip images vertically, with half of the probability."""
    scale: float = 0.2
    """Standard deviation of log2 of the scale."""
    rotation: float = 1.0
    """Largest angle / pi."""
    anisotropy: float = 0.2
    """Standard deviation of log2 of the stretch along an axis, which is compensated across. The axis is rotated for
    half of the images, by less than pi / 2, so that the parameters determine it; in EDM by up to pi."""
    translation: float = 0.125
    """Standard deviation of the translation / image size."""

    PARAMETERS: ClassVar[int] = 9
    """Per image: two flips, scale, and two each of the other maps; zero for an unchanged image."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise InputError(f"Expected a probability of augmentation in [0, 1], got {self.probability}.")
        for name in ("scale", "rotation", "anisotropy", "translation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"Expected {name} of the augmentation to be at least 0, got {getattr(self, name)}.")

    def __call__(self, images: Images, keys: Keys) -> tuple[Images, Float[Array, "b 9"]]:
        """Augmented images and their parameters; one key per image."""
        height, width = images.shape[1:3]
        maps, parameters = jax.vmap(lambda key: self.sample(key, height, width))(keys)
        return resample(images, maps), parameters

    def sample(self, key: Key[Array, ""], height: int, width: int) -> tuple[Matrix, Float[Array, " 9"]]:
        """The map from a pixel of the augmented image to its place in the given image, and its parameters."""
        normal, half, p = jax.random.normal, 0.5, self.probability

        def random(number: int, chance: float, value: Callable[[Key[Array, ""]], Array]) -> Float[Array, "..."]:
            own, coin = jax.random.split(jax.random.fold_in(key, number))
            return jnp.where(jax.random.uniform(coin) < chance, value(own), 0.0)

        def one(own: Key[Array, ""]) -> Float[Array, ""]:
            return jnp.float32(1)

        def angle(own: Key[Array, ""]) -> Float[Array, ""]:
            return jnp.pi * jax.random.uniform(own, minval=-1, maxval=1)

        x_flip = random(0, half * self.x_flip, one)
        y_flip = random(1, half * p * self.y_flip, one)
        scale = random(2, p * (self.scale > 0), normal)
        rotation = self.rotation * random(3, p, angle)
        stretch, axis = random(4, p * (self.anisotropy > 0), normal), random(5, half, angle) / 2
        move_x, move_y = random(6, p * (self.translation > 0), lambda own: normal(own, (2,)))
        factor = jnp.exp2(self.anisotropy * stretch)
        back = _rotated(axis)
        matrix = (
            _scaled(1 - 2 * x_flip, 1 - 2 * y_flip)
            @ _scaled(jnp.exp2(-self.scale * scale), jnp.exp2(-self.scale * scale))
            @ _rotated(rotation)
            @ back.T
            @ _scaled(1 / factor, factor)
            @ back
            @ _moved(-self.translation * width * move_x, -self.translation * height * move_y)
        )
        along = stretch * jnp.cos(axis), stretch * jnp.sin(axis)
        turn = jnp.cos(rotation) - 1, jnp.sin(rotation)
        return matrix, jnp.stack([x_flip, y_flip, scale, *turn, *along, move_x, move_y])


def _scaled(x: Float[Array, ""], y: Float[Array, ""]) -> Matrix:
    return jnp.diag(jnp.stack([x, y, jnp.ones_like(x)]))


def _rotated(angle: Float[Array, ""]) -> Matrix:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.eye(3).at[:2, :2].set(jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])]))


def _moved(x: Float[Array, ""] | float, y: Float[Array, ""] | float) -> Matrix:
    return jnp.eye(3).at[0, 2].set(x).at[1, 2].set(y)


def resample(images: Images, maps: Float[Array, "b 3 3"]) -> Images:
    """Each image at the places to which its map sends the pixels, interpolated with a Lanczos kernel of three lobes.

    The kernel is exact at pixels: the identity, flips and whole-pixel translations only move values.
    """
    return jax.vmap(_resample)(images, maps)


def _resample(image: Float[Array, "h w c"], matrix: Matrix) -> Float[Array, "h w c"]:
    height, width, _ = image.shape
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - middle_y, jnp.arange(width) - middle_x, indexing="ij")
    exact = jax.lax.Precision.HIGHEST
    place_x, place_y, _ = jnp.einsum("ij,jhw->ihw", matrix, jnp.stack([x, y, jnp.ones_like(x)]), precision=exact)
    place_x, place_y = place_x + middle_x, place_y + middle_y
    left, top = jnp.floor(place_x) - _LOBES + 1, jnp.floor(place_y) - _LOBES + 1

    def add(tap: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        row, column = top + tap // (2 * _LOBES), left + tap % (2 * _LOBES)
        weight = (_lanczos(place_y - row) * _lanczos(place_x - column))[..., None]
        values = image[_reflected(row, height), _reflected(column, width)]
        return sums[0] + weight * values, sums[1] + weight

    zeros = jnp.zeros_like(image), jnp.zeros((height, width, 1))
    values, weights = jax.lax.fori_loop(0, 4 * _LOBES**2, add, zeros)
    return values / weights


def _lanczos(distance: Float[Array, "h w"]) -> Float[Array, "h w"]:
    return jnp.where(jnp.abs(distance) < _LOBES, jnp.sinc(distance) * jnp.sinc(distance / _LOBES), 0)


def _reflected(index: Float[Array, "h w"], size: int) -> Array:
    """Indices continued by reflection: -1 -> 1, size -> size - 2."""
    period = max(2 * (size - 1), 1)
    index = index.astype(jnp.int32) % period
    return jnp.minimum(index, period - index) if size > 1 else index
