"""Images and texts of the demo page, as plain functions of a model and the settings on the page."""

import contextlib
import dataclasses
import io
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cm_jax.data.npz import bundled_emoji
from cm_jax.editing import Luma, Mask, Operator, PatchMean, photos
from cm_jax.errors import InputError, check_int, one_line
from cm_jax.io.images import check_finite, fits_png, grid, picture_of, quantize
from cm_jax.model import Model

MAX_IMAGES, MAX_STEPS = 16, 40
STRIP = (1, 2, 4)
"""Numbers of steps in the comparison."""
EXAMPLES = {"cat": "1F63D", "smirk": "1F60F", "mango": "1F96D", "globe": "1F30E", "flag": "1F1EC-1F1E7"}
"""Emoji of the held-out split, by code point."""

CANVAS, _CELL = 384, 128
"""Smallest sides of an image on the canvas and in a grid: small images are enlarged by nearest-neighbor resizing."""
_MAX_SIDE = 1024
_GUIDANCE = 1.0, 4.0

Layers = Sequence[UInt8[np.ndarray, "h w 4"]]
"""What was painted on the canvas."""


class Picture(NamedTuple):
    """A picture to edit."""

    name: str
    size: tuple[int, int]
    """Width and height of the whole picture."""
    square: Image.Image
    """Its center square."""


def describe_model(model: Model) -> str:
    """A line about a model."""
    network = model.config.network
    height, width, _ = network.image_shape
    kind = "consistency model" if model.config.distilled else "denoiser (sampling only)"
    classes = f"{network.classes} classes" if network.classes else "unconditional"
    millions = sum(leaf.size for leaf in jax.tree.leaves(model.params)) / 1e6
    return f"{kind}, {width} x {height} pixels, {classes}, {millions:.1f} million parameters"


def class_choices(model: Model) -> list[tuple[str, int]]:
    """Name and number of every class; none for an unconditional model."""
    names = model.config.class_names
    return [(names[i] if names else str(i), i) for i in range(model.config.network.classes or 0)]


def guidance_range(model: Model) -> tuple[float, float] | None:
    """The guidance strengths to offer; None for a model that cannot be guided by itself."""
    config = model.config
    if config.network.guidance_embedding:
        return config.guidance_range or _GUIDANCE
    guided = not config.distilled and config.network.classes is not None and config.label_dropout != 0
    return _GUIDANCE if guided else None


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample."""

    seeds: tuple[int, ...]
    label: int | None
    """None: a random class for each image."""
    count: int
    """Number of images of a single seed; several seeds give one each."""
    guidance: float | None

    @property
    def names(self) -> list[str]:
        """A name for the file of each image."""
        first, *others = self.seeds
        if others:
            return [f"seed{seed}" for seed in self.seeds]
        return [f"seed{first}_{index:02d}" for index in range(self.count)]

    def sample(self, model: Model, steps: int, most: int = MAX_IMAGES) -> Float[np.ndarray, "b h w c"]:
        """The first `most` images."""
        options: Any = {"labels": self.label, "steps": steps, "guidance": self.guidance}
        first, *others = self.seeds
        if others:
            return model.sample(seeds=self.seeds[:most], **options)
        return model.sample(first, min(self.count, most), **options)


def read_request(model: Model, seeds: str, label: int | None, count: int, guidance: float | None) -> Request:
    """The request in the fields of the page. Raises InputError."""
    model.config.check_pixels()
    if not fits_png(channels := model.config.network.image_shape[2], rgba=False):
        raise InputError(
            f"The page shows gray and RGB images, got a model of {channels} channels: use `cm-jax sample`."
        )
    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError as error:
        raise InputError(f"Expected a seed or several, separated by commas, got {one_line(seeds)}.") from error
    check_int("Number of seeds", len(numbers), 1, MAX_IMAGES)
    check_int("Number of images", count, 1, MAX_IMAGES)
    return Request(numbers, label, count, guidance if guidance_range(model) else None)


def sample_grid(model: Model, request: Request, steps: int) -> tuple[Image.Image, bytes, str]:
    """The images, a .zip file of them, and a line about the noise levels. Raises InputError."""
    check_int("Steps", steps, 1, MAX_STEPS)
    images = request.sample(model, steps)
    levels = ", ".join(f"{level:.3g}" for level in model.plan(steps=steps).levels[:-1])
    kind = "level of the step" if steps == 1 else f"levels of the {steps} steps"
    return _grid(images), zipped(images, request.names), f"Noise {kind}: {levels}"


def steps_strip(model: Model, request: Request) -> Image.Image:
    """The first four images in one, two and four steps, a row each. Raises InputError."""
    rows = [quantize(check_finite(request.sample(model, steps, most=4))) for steps in STRIP]
    names = [f"{steps} step{'s' if steps > 1 else ''}" for steps in STRIP]
    return grid(_enlarge(np.concatenate(rows), _CELL), len(rows[0]), names)


def zipped(images: Float[np.ndarray, "b h w c"], names: Sequence[str]) -> bytes:
    """A .zip file with a PNG file for each image, at the model's size."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for pixels, name in zip(quantize(images), names, strict=True):
            with files.open(f"{name}.png", "w") as file:
                picture_of(pixels).save(file, "PNG")
    return archive.getvalue()


_first_runs: dict[tuple[Any, ...], float] = {}
"""Seconds of the first run of a program, which compiles it, by model and settings."""


def compiling(*program: Any) -> str:
    """A line for the time of compilation if this program has not run yet; else an empty one."""
    if program in _first_runs:
        return ""
    usual = "usually 2 seconds for the bundled models, longer for large ones"
    if _first_runs:
        usual = f"the last program took {max(1, round(list(_first_runs.values())[-1]))} s"
    return f"Compiling for these settings, once for each number of steps and images: {usual} ..."


@contextlib.contextmanager
def running(*program: Any) -> Iterator[None]:
    """Notes that the block runs this program, and the time of the first run."""
    began = time.perf_counter()
    yield
    _first_runs.setdefault(program, time.perf_counter() - began)


def read_picture(content: bytes, name: str) -> Picture:
    """The picture in the bytes of a file. Raises InputError.

    A very large one is halved in size, which is how resizing it for a model of up to 1024 pixels starts.
    """
    whole = photos.decode(content, name)
    square = whole.crop(photos.center_box(*whole.size))
    while square.width >= 2 * _MAX_SIDE:
        square = square.resize((square.width // 2, square.height // 2), Image.Resampling.BOX)
    return Picture(name, whole.size, square)


def example(name: str) -> tuple[Picture, str]:
    """A bundled emoji and the name of its class."""
    arrays = bundled_emoji()
    number = np.flatnonzero(arrays["unified"] == EXAMPLES[name])[0]
    image = Image.fromarray(arrays["images"][number])
    return Picture(name, image.size, image), str(arrays["class_names"][arrays["labels"][number]])


def canvas_image(model: Model, picture: Picture) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """The picture at the model's size, enlarged for painting, and a line about it. Raises InputError."""
    side = _side(model)
    width, height = picture.size
    pixels = _enlarge(quantize(photos.fit(picture.square, side)[None]), CANVAS)[0]
    part = "" if width == height else "center of "
    resized = "" if picture.size == (side, side) else f", resized to {side} x {side}"
    return pixels, f"{part}{picture.name}, {width} x {height} pixels{resized}"


def edit_grids(
    model: Model, kind: str, picture: Picture, layers: Layers, label: int | None, seed: int, steps: int, variants: int
) -> tuple[Image.Image, Image.Image, bytes]:
    """The picture with its known part, its edits of one of the KINDS, and a .zip file of the edits.

    layers: paint on `canvas_image`, over the pixels to inpaint. Raises InputError.
    """
    side = _side(model)
    check_int("Steps", steps, 1, MAX_STEPS)
    check_int("Number of images", variants, 1, MAX_IMAGES)
    images, operator = photos.fit(picture.square, side)[None], KINDS[kind](layers, side)
    edits = model.edit(seed, images, operator, labels=label, steps=steps, variants=variants)
    known = np.asarray(operator.preview(jnp.asarray(images)))
    names = [f"edit{index:02d}_seed{seed}" for index in range(variants)]
    return _grid(np.concatenate([images, known]), columns=1), _grid(edits), zipped(edits, names)


def _side(model: Model) -> int:
    """The side of a model's images. Raises InputError unless they are square RGB images."""
    height, width, channels = model.config.network.image_shape
    if height != width or channels != 3:
        found = f"{height} x {width} pixels and {channels} channels"
        raise InputError(f"The page edits square RGB images, got a model of {found}: use `cm-jax edit`.")
    return height


def painted_pixels(layers: Layers) -> Bool[np.ndarray, "h w"]:
    """Where any layer is more than half opaque. Raises InputError where none is."""
    holes = [layer[..., 3] >= 128 for layer in layers]
    if not holes or not np.any(holes):
        raise InputError("Nothing is painted yet: paint over the part of the picture to inpaint.")
    return np.any(holes, axis=0)


KINDS: dict[str, Callable[[Layers, int], Operator]] = {
    "Inpaint": lambda layers, side: Mask(~photos.fit_hole(painted_pixels(layers), side)[None, ..., None]),
    "Colorize": lambda layers, side: Luma(),
    "Super-resolution": lambda layers, side: PatchMean(4),
}


def _grid(images: Float[np.ndarray, "b h w c"], columns: int = 4) -> Image.Image:
    return grid(_enlarge(quantize(check_finite(images)), _CELL), min(columns, len(images)))


def _enlarge(images: UInt8[np.ndarray, "b h w c"], least: int) -> UInt8[np.ndarray, "b H W c"]:
    zoom = max(1, math.ceil(least / max(images.shape[1:3])))
    return images.repeat(zoom, axis=1).repeat(zoom, axis=2)
