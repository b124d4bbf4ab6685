"""`edit`: inpaint, colorize, super-resolve, stroke, denoise and interpolate images with a consistency model."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from cm_jax.checkpoints.published import DEFAULT, resolve
from cm_jax.cli.labels import LabelTexts, read_labels
from cm_jax.cli.options import Levels, Network, WhichWeights
from cm_jax.cli.parsing import choose, numbers, parse
from cm_jax.cli.running import say, stopwatch, use_compilation_cache
from cm_jax.data.decoding import resize
from cm_jax.editing import Luma, Mask, Noisy, Operator, PatchMean, Strokes, photos
from cm_jax.errors import InputError, check_int
from cm_jax.io.atomic import atomic_write, check_writable
from cm_jax.io.images import LARGEST_GRID, check_finite, fits_png, grid, quantize, save_grid
from cm_jax.model import Model
from cm_jax.samplers import NoiseLevelArgs

Shape = tuple[int, int, int]
"""Height, width and channels of a model's images."""
Pictures = Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGE...", help_behavior_hint="(required)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edit(WhichWeights, Network):
    checkpoint: str = DEFAULT
    """A checkpoint in any format that `convert` reads (native, .pt, .pkl, a diffusers folder, ...), a run folder (its
    latest checkpoint), an id of the Hugging Face Hub (OWNER/NAME), or the name of a bundled or downloaded model."""
    labels: LabelTexts = ()
    """Classes by index or name, separated by commas, as a JSON list, or by several --labels: one for all images or one
    per image. Required for a class-conditional model. Default: none."""
    guidance: float | None = None
    """Guidance strength, for a model distilled with a range of them. Default: 1, no guidance."""
    output: Path = Path("edited.png")
    """Grid of results. Each row shows an input at the model's size, its known part if that differs, and its edits."""
    rgba: bool = False
    """Edit RGBA images with a model of 4 channels."""

    def check_output(self) -> None:
        if self.output.suffix.lower() != ".png":
            raise InputError(f"{self.output}: the grid must be a .png file; use --folder for single images.")
        check_writable(self.output, folder=False)

    def model(self) -> tuple[Model, Shape]:
        """The model, and the shape of its images. Raises InputError if they are not gray, RGB or RGBA."""
        use_compilation_cache(self.compilation_cache)
        model = self.load(resolve(self.checkpoint), self.precision)
        *_, channels = shape = model.config.network.image_shape
        if self.rgba and channels != 4:
            raise InputError(f"--rgba applies to models with 4 channels, this one has {channels}: leave it out.")
        if not fits_png(channels, self.rgba):
            advice = "if they are RGBA, give --rgba, else" if channels == 4 else "use"
            expected = "Expected a model of gray or RGB images to edit pictures"
            raise InputError(f"{expected}, got {channels} channels: {advice} Model.edit in Python.")
        return model, shape

    def common(self, model: Model) -> dict[str, Any]:
        """Arguments of every kind of edit."""
        labels = read_labels(self.labels, model.config.class_names) or None
        return {"labels": labels, "batch_size": self.batch_size, "guidance": self.guidance}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures(_Edit):
    pictures: Pictures
    """Images to edit. The center, with the aspect ratio of the model, is resized to the model's size."""
    variants: int = 4
    """Number of edits per image."""
    folder: Path | None = None
    """Folder for the single edits, each pasted into its image at full size (`superres`: enlarged to the model's size if
    it is smaller; `colorize`: only the colors), with its transparency. Default: not written."""

    def hole(self, picture: Image.Image) -> np.ndarray | None:
        """The pixels to edit; None for all."""
        return None

    def fit(self, picture: Image.Image, shape: Shape) -> np.ndarray:
        return photos.fit(picture, shape[:2], shape[2])

    def canvas(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The picture to paste the edits of this size into."""
        return picture

    def images(self, pictures: Sequence[Image.Image], shape: Shape) -> np.ndarray:
        """The pictures at the model's size."""
        return np.stack([self.fit(picture, shape) for picture in pictures])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps(Levels, _Pictures):
    steps: int | None = None
    """Number of editing steps. Default: 17."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(_Steps):
    """Inpaint a region, given by a mask or a box."""

    mask: Path | None = None
    """Image of the same size, white where to inpaint, or a copy of the image with this part erased (transparent).
    Default: --box."""
    box: str = ""
    """Region to inpaint in place of a mask: left,top,right,bottom in pixels of the image. Default: --mask."""

    def __post_init__(self) -> None:
        if (self.mask is None) == (not self.box):
            raise InputError("Specify the region with either --mask FILE or --box left,top,right,bottom.")

    def hole(self, picture: Image.Image) -> np.ndarray:
        if self.mask is not None:
            hole = photos.hole_from_mask(photos.read_mask(self.mask), *picture.size)
            say(f"{self.mask.name}: {hole.sum():,} of {hole.size:,} pixels to inpaint.")
            return hole
        box = numbers("box", self.box, int)
        if box is None or len(box) != 4:
            raise InputError(f"--box must be left,top,right,bottom, got {self.box!r}.")
        return photos.hole_from_box(box, *picture.size)

    def operator(self, shape: Shape, holes: Sequence[Any]) -> Operator:
        fitted = np.stack([photos.fit_hole(hole, shape[:2]) for hole in holes])
        for path, hole in zip(self.pictures, holes, strict=True):
            left, top, right, bottom = photos.center_box(hole.shape[1], hole.shape[0], shape[:2])
            if outside := hole.sum() - hole[top:bottom, left:right].sum():
                say(f"{path.name}: {outside:,} pixels to inpaint stay: they lie outside the center, which is edited.")
        return Mask(~fitted[..., None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colorize(_Steps):
    """Colorize gray images. Color images keep their luma."""

    def operator(self, *_: Any) -> Operator:
        return Luma()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResolve(_Steps):
    """Super-resolve small images. Larger images are reduced to patch means first."""

    patch: int = 4
    """Scale factor: side of a patch in pixels."""

    def operator(self, shape: Shape, *_: Any) -> Operator:
        operator = PatchMean(self.patch)
        operator.check((1, *shape))
        return operator

    def fit(self, picture: Image.Image, shape: Shape) -> np.ndarray:
        height, width, channels = shape
        left, top, right, bottom = photos.center_box(*picture.size, (height, width))
        tiny = bottom - top <= height // self.patch and right - left <= width // self.patch
        return (
            photos.fit_patches(picture, (height, width), self.patch, channels) if tiny else super().fit(picture, shape)
        )

    def canvas(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        left, top, right, bottom = photos.center_box(*picture.size, size)
        scale = max(size[0] / (bottom - top), size[1] / (right - left))
        return resize(picture, scale) if scale > 1 else picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stroke(_Pictures):
    """Turn a stroke painting into an image, or vary an image (SDEdit)."""

    sigmas: str = ""
    """Noise levels, decreasing. A higher first level changes more. Default: the paper's 5.38 and 2.24 at 256 pixels,
    scaled with the size."""

    @property
    def levels(self) -> NoiseLevelArgs:
        return {"sigmas": numbers("sigmas", self.sigmas, float)}

    def operator(self, *_: Any) -> Operator:
        return Strokes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(_Pictures):
    """Denoise images with a known noise level."""

    sigma: float
    """Standard deviation of the noise for pixels in [-1, 1]: 25/255 is 0.196."""
    add: bool = False
    """Add noise of this level first, to demonstrate denoising."""
    variants: int = 1
    """Number of edits per image; identical unless noise is added."""

    @property
    def levels(self) -> NoiseLevelArgs:
        return {"sigmas": (self.sigma,)}

    def operator(self, *_: Any) -> Operator:
        return Noisy()

    def images(self, pictures: Sequence[Image.Image], shape: Shape) -> np.ndarray:
        images = super().images(pictures, shape)
        if not self.add:
            return images
        rng = np.random.default_rng(check_int("A seed", self.seed, 0, 2**32 - 1))
        return images + self.sigma * rng.standard_normal(images.shape, np.float32)


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


_KINDS = {
    "inpaint": Inpaint,
    "colorize": Colorize,
    "superres": SuperResolve,
    "stroke": Stroke,
    "denoise": Denoise,
    "interpolate": Interpolate,
}


def main(prog: str, words: Sequence[str]) -> None:
    """`prog KIND IMAGE... [options]`."""
    name, kind, rest = choose(_KINDS, "kind", f"{prog} KIND IMAGE... [options]", words)
    args = parse(kind, f"{prog} {name}", rest)
    args.check_output()
    if isinstance(args, Interpolate):
        _interpolate(args)
    else:
        _edit(args)


def _edit(args: Inpaint | Colorize | SuperResolve | Stroke | Denoise) -> None:
    """Edit the pictures at the model's size; write the grid and the folder."""
    if args.folder is not None:
        check_writable(args.folder, folder=True)
    if not 1 <= len(args.pictures) <= LARGEST_GRID:
        raise InputError(f"Name the images to edit, 1 to {LARGEST_GRID}; got {len(args.pictures)}.")
    pictures = [photos.read(path) for path in args.pictures]
    holes = [args.hole(picture) for picture in pictures]
    model, shape = args.model()
    operator, given = args.operator(shape, holes), args.images(pictures, shape)
    columns = check_int("variants", args.variants, 1, LARGEST_GRID // len(given))
    _print_notes(args.pictures, pictures, shape[:2])
    with stopwatch() as elapsed:
        edits = model.edit(args.seed, given, operator, variants=columns, **args.common(model), **args.levels)
    edits = quantize(check_finite(edits)).reshape(len(given), columns, *given.shape[1:])
    before, known = (quantize(np.asarray(shown))[:, None] for shown in (given, operator.preview(jnp.asarray(given))))
    parts = [before, edits] if np.array_equal(before, known) else [before, known, edits]
    rows = np.concatenate(parts, axis=1)
    save_grid(args.output, grid(rows.reshape(-1, *given.shape[1:]), rows.shape[1]))
    say(f"Edited in {elapsed()}.")
    say(f"Wrote {args.output}. Each row: {'input, edits' if len(parts) == 2 else 'input, known part, edits'}.")
    if args.folder is not None:
        with atomic_write(args.folder) as beside:
            beside.mkdir()
            for row, column in itertools.product(range(len(given)), range(columns)):
                canvas, colors_only = args.canvas(pictures[row], shape[:2]), isinstance(operator, Luma)
                whole = photos.paste_back(canvas, edits[row, column], holes[row], colors_only=colors_only)
                whole.save(beside / f"{row:03d}_{args.pictures[row].stem}_{column:02d}.png")
        say(f"Wrote the single edits at full size to {args.folder}.")


def _interpolate(args: Interpolate) -> None:
    seeds, sigmas = numbers("seeds", args.seeds, int), numbers("sigmas", args.sigmas, float)
    if len(seeds or args.pictures) != 2 or (seeds and args.pictures):
        raise InputError("Expected two images, or --seeds with two numbers.")
    frames = check_int("frames", args.frames, 2, LARGEST_GRID)
    pictures = [photos.read(path) for path in args.pictures]
    model, shape = args.model()
    if seeds:
        images = model.interpolate_noise(seeds[0], seeds[1], frames, **args.common(model), sigmas=sigmas)
    else:
        _print_notes(args.pictures, pictures, shape[:2])
        first, second = (photos.fit(picture, shape[:2], shape[2]) for picture in pictures)
        images = model.interpolate_images(args.seed, first, second, frames, **args.common(model), sigmas=sigmas)
        images = np.stack([first, *images, second])
    save_grid(args.output, grid(quantize(check_finite(images)), len(images)))
    say(f"Wrote {args.output}, from left to right{'' if seeds else ', with the input images at both ends'}.")


def _print_notes(paths: Sequence[Path], pictures: Sequence[Image.Image], size: tuple[int, int]) -> None:
    """Print how each picture is cropped and resized to the model's size."""
    for path, picture in zip(paths, pictures, strict=True):
        if notes := photos.fit_notes(picture, size):
            say(f"{path.name}: {', '.join(notes)}.")
