"""`edit`: inpaint, colorize, super-resolve, stroke, denoise and interpolate images with a consistency model."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from cm_jax.checkpoints.published import DEFAULT
from cm_jax.checkpoints.resolve import resolve
from cm_jax.cli.parsing import choose, numbers, parse
from cm_jax.cli.running import compilation_time, say, use_compilation_cache
from cm_jax.editing import Luma, Mask, Noisy, Operator, PatchMean, Strokes, photos
from cm_jax.errors import InputError, check_int
from cm_jax.io.atomic import atomic_write, check_writable
from cm_jax.io.images import grid, quantize, save_grid
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.types import Precision

_LARGEST_GRID = 4096

Pictures = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edit:
    checkpoint: str = DEFAULT
    """A checkpoint (native, an OpenAI .pt file or a diffusers folder), a run folder (its latest checkpoint), or the
    name of a bundled model."""
    labels: str = ""
    """Classes by index or name, separated by commas: one for all images or one per image. Required for a
    class-conditional model. Default: none."""
    seed: int = 0
    """Random seed. The edits do not depend on the batch size or the devices."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions in the network."""
    batch_size: int | None = None
    """Images per batch over all devices. Default: 64 per device, fewer above 64 pixels."""
    output: Path = Path("edited.png")
    """Grid of results. Each row shows an input at the model's size, its known part if that differs, and its edits."""
    compilation_cache: str = ""
    """Folder for JAX's compilation cache, or "off". Default: in the user's cache folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures(_Edit):
    pictures: Pictures
    """Images to edit: png, jpg, webp, gif or bmp. The center square is resized to the model's size."""
    variants: int = 4
    """Number of edits per image."""
    folder: Path | None = None
    """Folder for the single edits, each pasted into its image at full size. Default: not written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps(_Pictures):
    steps: int | None = None
    """Number of editing steps. Default: 17."""
    timesteps: str = ""
    """Timesteps in diffusers' convention, decreasing to 0: "22,0". Default: set by --steps."""
    indices: str = ""
    """Timesteps in OpenAI's convention, increasing from 0 to N - 1: "0,22,39". Default: set by --steps."""
    sigmas: str = ""
    """Noise levels, decreasing: "80,20,5,1". Default: set by --steps."""

    def levels(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "timesteps": numbers("timesteps", self.timesteps, int),
            "indices": numbers("indices", self.indices, int),
            "sigmas": numbers("sigmas", self.sigmas, float),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(_Steps):
    """Inpaint a region, given by a mask or a box."""

    mask: Path | None = None
    """Image of the same size, white where to inpaint. Default: --box."""
    box: str = ""
    """Region to inpaint in place of a mask: left,top,right,bottom in pixels of the image. Default: --mask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colorize(_Steps):
    """Colorize gray images. Color images keep their luma."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResolve(_Steps):
    """Super-resolve small images. Larger images are reduced to patch means first."""

    patch: int = 4
    """Scale factor: side of a patch in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stroke(_Pictures):
    """Turn a stroke painting into an image, or vary an image (SDEdit)."""

    sigmas: str = ""
    """Noise levels, decreasing. A higher first level changes more. Default: the paper's 5.38 and 2.24 at 256 pixels,
    scaled with the size."""

    def levels(self) -> dict[str, Any]:
        return {"sigmas": numbers("sigmas", self.sigmas, float)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(_Pictures):
    """Denoise images with a known noise level."""

    sigma: float
    """Standard deviation of the noise for pixels in [-1, 1]: 25/255 is 0.196."""
    add: bool = False
    """Add noise of this level first, to demonstrate denoising."""
    variants: int = 1
    """Number of edits per image; identical unless noise is added."""

    def levels(self) -> dict[str, Any]:
        return {"sigmas": (self.sigma,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(_Edit):
    """Interpolate between two images, or between the samples of two seeds."""

    pictures: Pictures = ()
    """Two images; none with --seeds."""
    seeds: str = ""
    """Two seeds, "3,8", whose noise is interpolated. Default: interpolate images."""
    frames: int = 8
    """Number of frames, including both ends."""
    sigmas: str = ""
    """Noise levels, decreasing. Default: those of `stroke` between images, sigma_max between seeds."""


def edit(prog: str, words: Sequence[str]) -> None:
    """`prog KIND IMAGE... [options]`."""
    name, kind, rest = choose(_KINDS, "kind of edit", f"{prog} KIND IMAGE [options]", words)
    _EDITS[kind](parse(kind, f"{prog} {name}", rest))


def _inpaint(arguments: Inpaint) -> None:
    if (arguments.mask is None) == (not arguments.box):
        raise InputError("Specify the region with either --mask FILE or --box left,top,right,bottom.")

    def hole(picture: Image.Image) -> np.ndarray:
        if arguments.mask is not None:
            return photos.hole_from_mask(photos.read(arguments.mask), *picture.size)
        box = numbers("box", arguments.box, int)
        if box is None or len(box) != 4:
            raise InputError(f"--box must be left,top,right,bottom, got {arguments.box!r}.")
        return photos.hole_from_box(box, *picture.size)

    pictures = _read(arguments)
    holes = [hole(picture) for picture in pictures]
    model = _model(arguments)
    size = model.config.network.image_shape[0]
    known = ~np.stack([photos.fit_hole(each, size) for each in holes])[..., None]
    _edit(arguments, model, pictures, [photos.fit(picture, size) for picture in pictures], Mask(known), holes)


def _colorize(arguments: Colorize) -> None:
    pictures, model = _read(arguments), _model(arguments)
    size = model.config.network.image_shape[0]
    _edit(arguments, model, pictures, [photos.fit(picture, size) for picture in pictures], Luma())


def _super_resolve(arguments: SuperResolve) -> None:
    pictures, model = _read(arguments), _model(arguments)
    size, operator = model.config.network.image_shape[0], PatchMean(arguments.patch)
    operator.check((len(pictures), *model.config.network.image_shape))
    small = size // arguments.patch

    def fit(picture: Image.Image) -> np.ndarray:
        tiny = min(picture.size) <= small
        return photos.fit_patches(picture, size, arguments.patch) if tiny else photos.fit(picture, size)

    _edit(arguments, model, pictures, [fit(picture) for picture in pictures], operator)


def _stroke(arguments: Stroke) -> None:
    pictures, model = _read(arguments), _model(arguments)
    size = model.config.network.image_shape[0]
    _edit(arguments, model, pictures, [photos.fit(picture, size) for picture in pictures], Strokes())


def _denoise(arguments: Denoise) -> None:
    pictures, model = _read(arguments), _model(arguments)
    size = model.config.network.image_shape[0]
    images = [photos.fit(picture, size) for picture in pictures]
    if arguments.add:
        check_int("A seed", arguments.seed, 0, 2**32 - 1)
        dice = np.random.default_rng(arguments.seed)
        images = [image + arguments.sigma * dice.standard_normal(image.shape, np.float32) for image in images]
    _edit(arguments, model, pictures, images, Noisy())


def _edit(
    arguments: _Steps | Stroke | Denoise,
    model: Model,
    pictures: Sequence[Image.Image],
    images: Sequence[np.ndarray],
    operator: Operator,
    holes: Sequence[np.ndarray] = (),
) -> None:
    """Edit the images at the model's size; write the grid and the folder."""
    given = np.stack(images)
    columns = check_int("variants", arguments.variants, 1, _LARGEST_GRID // len(given))
    _print_notes(arguments.pictures, pictures, given.shape[1])
    began = time.perf_counter()
    with compilation_time() as compiled:
        edits = model.edit(
            arguments.seed,
            given,
            operator,
            labels=_labels(arguments.labels),
            variants=columns,
            batch_size=arguments.batch_size,
            **arguments.levels(),
        )
    edits = quantize(edits).reshape(len(given), columns, *given.shape[1:])
    before, known = (quantize(np.asarray(shown))[:, None] for shown in (given, operator.preview(jnp.asarray(given))))
    parts = [before, edits] if np.array_equal(before, known) else [before, known, edits]
    rows = np.concatenate(parts, axis=1)
    save_grid(arguments.output, grid(rows.reshape(-1, *given.shape[1:]), rows.shape[1]))
    say(f"Edited in {time.perf_counter() - began:.1f} s (compilation: {compiled():.1f} s).")
    what = "input, edits" if len(parts) == 2 else "input, known part, edits"
    say(f"Wrote {arguments.output}. Each row: {what}.")
    if arguments.folder is not None:
        with atomic_write(arguments.folder) as beside:
            beside.mkdir()
            for row, column in itertools.product(range(len(given)), range(columns)):
                hole = holes[row] if holes else None
                whole = photos.paste_back(pictures[row], edits[row, column], hole)
                whole.save(beside / f"{row:03d}_{arguments.pictures[row].stem}_{column:02d}.png")
        say(f"Wrote the single edits at full size to {arguments.folder}.")


def _interpolate(arguments: Interpolate) -> None:
    _check_output(arguments.output, None)
    seeds, sigmas = numbers("seeds", arguments.seeds, int), numbers("sigmas", arguments.sigmas, float)
    if len(seeds or arguments.pictures) != 2 or (seeds and arguments.pictures):
        raise InputError("Expected two images, or --seeds with two numbers.")
    frames = check_int("frames", arguments.frames, 2, _LARGEST_GRID)
    pictures = [photos.read(path) for path in arguments.pictures]
    model = _model(arguments)
    labels, batch_size = _labels(arguments.labels), arguments.batch_size
    if seeds:
        images = model.interpolate_noise(
            seeds[0], seeds[1], frames, labels=labels, sigmas=sigmas, batch_size=batch_size
        )
    else:
        size = model.config.network.image_shape[0]
        _print_notes(arguments.pictures, pictures, size)
        ends = [photos.fit(picture, size) for picture in pictures]
        images = model.interpolate_images(
            arguments.seed, ends[0], ends[1], frames, labels=labels, sigmas=sigmas, batch_size=batch_size
        )
        images = np.stack([ends[0], *images, ends[1]])
    save_grid(arguments.output, grid(quantize(images), len(images)))
    say(f"Wrote {arguments.output}, from left to right{'' if seeds else ', with the input images at both ends'}.")


def _read(arguments: _Pictures) -> list[Image.Image]:
    _check_output(arguments.output, arguments.folder)
    if not 1 <= len(arguments.pictures) <= _LARGEST_GRID:
        raise InputError(f"Expected 1 to {_LARGEST_GRID} images, got {len(arguments.pictures)}.")
    return [photos.read(path) for path in arguments.pictures]


def _check_output(output: Path, folder: Path | None) -> None:
    if output.suffix.lower() != ".png":
        raise InputError(f"{output}: the grid must be a .png file; use --folder for single images.")
    check_writable(output, folder=False)
    if folder is not None:
        check_writable(folder, folder=True)


def _model(arguments: _Edit) -> Model:
    use_compilation_cache(arguments.compilation_cache)
    model = load(resolve(arguments.checkpoint), precision=arguments.precision)
    photos.check_square(model.config.network.image_shape)
    return model


def _print_notes(paths: Sequence[Path], pictures: Sequence[Image.Image], size: int) -> None:
    for path, picture in zip(paths, pictures, strict=True):
        line = photos.describe_fit(picture, path.name, size)
        if line:
            say(line)


def _labels(text: str) -> list[str] | None:
    return [part.strip() for part in text.split(",")] if text else None


_KINDS: dict[str, type[_Edit]] = {
    "inpaint": Inpaint,
    "colorize": Colorize,
    "superres": SuperResolve,
    "stroke": Stroke,
    "denoise": Denoise,
    "interpolate": Interpolate,
}
_EDITS: dict[type[_Edit], Callable[[Any], None]] = {
    Inpaint: _inpaint,
    Colorize: _colorize,
    SuperResolve: _super_resolve,
    Stroke: _stroke,
    Denoise: _denoise,
    Interpolate: _interpolate,
}
