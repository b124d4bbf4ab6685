"""What the page shows: plain functions from a model and what was chosen to pictures."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cm_jax.data.emoji import bundled
from cm_jax.editing import Luma, Mask, Operator, PatchMean, photos
from cm_jax.errors import InputError, check_int
from cm_jax.io.images import grid, quantize
from cm_jax.loading import load
from cm_jax.model import Model

MOST_IMAGES, MOST_STEPS = 16, 40
EXAMPLES = {"cat": "1F63D", "smirk": "1F60F", "mango": "1F96D", "globe": "1F30E", "flag": "1F1EC-1F1E7"}
"""Emoji of the held-out split, by code point."""

PAINTED, _SHOWN = 384, 128
"""Sides to which images are enlarged, by a whole number and without smoothing: to be painted on, and in a grid."""
_KEPT = 1024

loaded = functools.cache(load)
"""A model by the path of its checkpoint: read when it is first asked for, and kept."""


class Picture(NamedTuple):
    """A picture to edit."""

    name: str
    size: tuple[int, int]
    """Of the whole picture."""
    square: Image.Image
    """Its middle."""


def described(model: Model) -> str:
    """What a model is, in a line."""
    network = model.config.network
    height, width, _ = network.image_shape
    kind = "consistency model" if model.config.distilled else "denoiser, which does not edit"
    classes = f"{network.classes} classes" if network.classes else "no classes"
    millions = sum(leaf.size for leaf in jax.tree.leaves(model.params)) / 1e6
    return f"{kind}, {width} x {height} pixels, {classes}, {millions:.1f} million parameters"


def class_choices(model: Model) -> list[tuple[str, int]]:
    """Name and number of every class; none for an unconditional model."""
    names = model.config.class_names
    return [(names[i] if names else str(i), i) for i in range(model.config.network.classes or 0)]


def one_beside_many(
    model: Model, seed: int, label: int | None, steps: int, count: int
) -> tuple[Image.Image, Image.Image, str]:
    """Images of one step; the same in `steps` steps, from the same noise; and the levels of these, in a line.

    label None: a class for every image, drawn from the seed. Raises InputError.
    """
    check_int("Steps", steps, 2, MOST_STEPS)
    check_int("Images", count, 1, MOST_IMAGES)
    one, many = (model.sample(seed, count, labels=label, steps=number) for number in (1, steps))
    levels = model.plan(steps=steps).levels[:-1]
    return _sheet(one), _sheet(many), f"{steps} steps, at noise of {', '.join(f'{level:.3g}' for level in levels)}"


def read(content: bytes, name: str) -> Picture:
    """The picture in a file's bytes. Raises InputError.

    A very large one is halved, as fitting it to a model of up to 1024 pixels would begin.
    """
    whole = photos.decoded(content, name)
    square = whole.crop(photos.middle(*whole.size))
    while square.width >= 2 * _KEPT:
        square = square.resize((square.width // 2, square.height // 2), Image.Resampling.BOX)
    return Picture(name, whole.size, square)


def example(name: str) -> tuple[Picture, str]:
    """A bundled emoji, and the name of its class."""
    arrays = bundled()
    number = np.flatnonzero(arrays["unified"] == EXAMPLES[name])[0]
    image = Image.fromarray(arrays["images"][number])
    return Picture(name, image.size, image), str(arrays["class_names"][arrays["labels"][number]])


def as_seen(model: Model, picture: Picture) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """The picture as the model sees it, enlarged to be painted on, and what was done to it. Raises InputError."""
    side = photos.square_side(model.config.network.image_shape)
    width, height = picture.size
    seen = quantize(photos.fitted(picture.square, side)[None])
    part = "" if width == height else "the middle of "
    return _enlarged(seen, PAINTED)[0], f"{part}{picture.name}, {width} x {height} pixels, seen at {side} x {side}"


def edits(
    model: Model,
    kind: str,
    picture: Picture,
    layers: Sequence[UInt8[np.ndarray, "h w 4"]],
    seed: int,
    label: int | None,
    steps: int,
    variants: int,
) -> tuple[Image.Image, Image.Image]:
    """The picture with what is known of it; and its edits of one of the KINDS.

    layers: what was painted on `as_seen`; inpainting makes it anew. Raises InputError.
    """
    side = photos.square_side(model.config.network.image_shape)
    check_int("Steps", steps, 1, MOST_STEPS)
    check_int("Edits", variants, 1, MOST_IMAGES)
    given, operator = photos.fitted(picture.square, side)[None], KINDS[kind](layers, side)
    edited = model.edit(seed, given, operator, labels=label, steps=steps, variants=variants)
    known = np.asarray(operator.shown(jnp.asarray(given)))
    return _sheet(np.concatenate([given, known]), columns=1), _sheet(edited)


def painted(layers: Sequence[UInt8[np.ndarray, "h w 4"]]) -> Bool[np.ndarray, "h w"]:
    """Where any layer is more than half opaque. Raises InputError where none is."""
    holes = [layer[..., 3] >= 128 for layer in layers]
    if not holes or not np.any(holes):
        raise InputError("Nothing is painted yet: paint on the picture over what is to be made anew.")
    return np.any(holes, axis=0)


def _mask(layers: Sequence[UInt8[np.ndarray, "h w 4"]], side: int) -> Operator:
    return Mask(~photos.fitted_hole(painted(layers), side)[None, ..., None])


KINDS: dict[str, Callable[[Sequence[UInt8[np.ndarray, "h w 4"]], int], Operator]] = {
    "Inpaint": _mask,
    "Colourise": lambda layers, side: Luma(),
    "Super-resolve": lambda layers, side: PatchMean(4),
}


def _sheet(images: Float[np.ndarray, "b h w c"], columns: int = 4) -> Image.Image:
    return grid(_enlarged(quantize(images), _SHOWN), min(columns, len(images)))


def _enlarged(images: UInt8[np.ndarray, "b h w c"], least: int) -> UInt8[np.ndarray, "b H W c"]:
    zoom = max(1, math.ceil(least / max(images.shape[1:3])))
    return images.repeat(zoom, axis=1).repeat(zoom, axis=2)
