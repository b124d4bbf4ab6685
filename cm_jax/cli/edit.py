"""`edit`: inpaint, colourise, sharpen, repaint, denoise and blend pictures with a consistency model."""

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
from cm_jax.cli.parsing import chosen, numbers, parsed
from cm_jax.cli.running import compilation_time, say, use_compilation_cache
from cm_jax.editing import Luma, Mask, Noisy, Operator, PatchMean, Strokes, photos
from cm_jax.errors import InputError, check_int
from cm_jax.io.atomic import atomic_write, check_writable
from cm_jax.io.images import grid, quantize, save_grid
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.types import Precision

_LARGEST_GRID = 4096

Pictures = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE...")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edit:
    checkpoint: str = DEFAULT
    """A cm_jax checkpoint, a run's folder, the original's .pt file, a diffusers folder, or the name of a bundled
    model."""
    labels: str = ""
    """Classes by number or name, one for all or one per picture; a class-conditional model must be told."""
    seed: int = 0
    """The same seed gives the same edits, whatever the batch size and the devices."""
    precision: Precision = "float32"
    """Of the products inside the network."""
    batch_size: int | None = None
    """Images edited at once over all devices. Default: 64 a device, fewer above 64 pixels."""
    output: Path = Path("edited.png")
    """A grid: in every row a picture as the model sees it, what is known of it where that is less, and its edits."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures(_Edit):
    pictures: Pictures
    """One or several: png, jpg, webp, gif or bmp. The model sees the square in the middle, scaled to its size."""
    variants: int = 4
    """Edits of every picture."""
    folder: Path | None = None
    """Where every edit is written by itself as well, at the size of its picture and in its place there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps(_Pictures):
    steps: int | None = None
    """Number of steps. Default: 17."""
    timesteps: str = ""
    """Grid indices as diffusers writes them, falling to 0: "22,0"."""
    indices: str = ""
    """Grid indices as the original writes them, rising from 0 to the last: "0,22,39"."""
    sigmas: str = ""
    """Noise levels, falling: "80,20,5,1"."""

    def levels(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "timesteps": numbers("timesteps", self.timesteps, int),
            "indices": numbers("indices", self.indices, int),
            "sigmas": numbers("sigmas", self.sigmas, float),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(_Steps):
    """Paint a hole anew: what is white in a mask, or in a box."""

    mask: Path | None = None
    """A picture of the same size, white where it is to be painted anew."""
    box: str = ""
    """In place of a mask: left,top,right,bottom in pixels of the picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colorize(_Steps):
    """Colour grey pictures. Of pictures in colour the brightness is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResolve(_Steps):
    """Invent the details of small pictures. Of larger ones the means of patches are kept."""

    patch: int = 4
    """How many times larger: pixels of a patch's side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repaint(_Pictures):
    """Make a picture of coloured strokes, or a new one like a picture (SDEdit)."""

    sigmas: str = ""
    """Noise levels, falling; the first one says how much is hidden: higher ones change more. Default: the paper's, 5.38
    and 2.24 at 256 pixels and in proportion at other sizes."""

    def levels(self) -> dict[str, Any]:
        return {"sigmas": numbers("sigmas", self.sigmas, float)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(_Pictures):
    """Take noise of a known level out of pictures."""

    sigma: float
    """Standard deviation of the noise, where black to white is 2: noise of 25 in 255 is 0.196."""
    add: bool = False
    """Put that noise into the pictures first (a seed's), to see what the model makes of it."""
    variants: int = 1
    """Edits of every picture: all the same, unless noise is added."""

    def levels(self) -> dict[str, Any]:
        return {"sigmas": (self.sigma,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(_Edit):
    """Go from one picture to another, or from one seed's image to another's."""

    pictures: Pictures = ()
    """Two of them; or none, with --seeds."""
    seeds: str = ""
    """Two: "3,8". The noise of one is turned into the noise of the other."""
    frames: int = 8
    """Images from one to the other, both ends included."""
    sigmas: str = ""
    """Noise levels, falling. Default: between pictures those of `repaint`, between seeds sigma_max."""


def edit(prog: str, words: Sequence[str]) -> None:
    """`prog KIND PICTURE... [options]`."""
    name, kind, rest = chosen(_KINDS, "kind of edit", f"{prog} KIND PICTURE [options]", words)
    _EDITS[kind](parsed(kind, f"{prog} {name}", rest))


def _inpaint(arguments: Inpaint) -> None:
    if (arguments.mask is None) == (not arguments.box):
        raise InputError("Say what is to be painted anew: --mask FILE or --box left,top,right,bottom, one of them.")

    def hole(picture: Image.Image) -> np.ndarray:
        if arguments.mask is not None:
            return photos.hole_from_mask(photos.read(arguments.mask), *picture.size)
        box = numbers("box", arguments.box, int)
        if box is None or len(box) != 4:
            raise InputError(f"--box wants left,top,right,bottom, got {arguments.box!r}.")
        return photos.hole_from_box(box, *picture.size)

    pictures = _read(arguments)
    holes = [hole(picture) for picture in pictures]
    model = _model(arguments)
    size = model.config.network.image_shape[0]
    known = ~np.stack([photos.fit_hole(each, size) for each in holes])[..., None]
    _edit(arguments, model, pictures, [photos.fit(picture, size) for picture in pictures], Mask(known), holes)


def _colourise(arguments: Colorize) -> None:
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


def _repaint(arguments: Repaint) -> None:
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
    arguments: _Steps | Repaint | Denoise,
    model: Model,
    pictures: Sequence[Image.Image],
    images: Sequence[np.ndarray],
    operator: Operator,
    holes: Sequence[np.ndarray] = (),
) -> None:
    """Edit the fitted images, and write the grid and the folder."""
    given = np.stack(images)
    columns = check_int("variants", arguments.variants, 1, _LARGEST_GRID // len(given))
    _tell(arguments.pictures, pictures, given.shape[1])
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
    say(f"Edited in {time.perf_counter() - began:.1f} s, {compiled():.1f} s of it compiling.")
    what = "given, edits" if len(parts) == 2 else "given, what is known of it, edits"
    say(f"Each row of {arguments.output}: {what}.")
    if arguments.folder is not None:
        with atomic_write(arguments.folder) as beside:
            beside.mkdir()
            for row, column in itertools.product(range(len(given)), range(columns)):
                hole = holes[row] if holes else None
                whole = photos.paste_back(pictures[row], edits[row, column], hole)
                whole.save(beside / f"{row:03d}_{arguments.pictures[row].stem}_{column:02d}.png")
        say(f"Each by itself, at its picture's size, is in {arguments.folder}.")


def _interpolate(arguments: Interpolate) -> None:
    _check_output(arguments.output, None)
    seeds, sigmas = numbers("seeds", arguments.seeds, int), numbers("sigmas", arguments.sigmas, float)
    if len(seeds or arguments.pictures) != 2 or (seeds and arguments.pictures):
        raise InputError("Give two pictures, or --seeds with two numbers.")
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
        _tell(arguments.pictures, pictures, size)
        ends = [photos.fit(picture, size) for picture in pictures]
        images = model.interpolate_images(
            arguments.seed, ends[0], ends[1], frames, labels=labels, sigmas=sigmas, batch_size=batch_size
        )
        images = np.stack([ends[0], *images, ends[1]])
    save_grid(arguments.output, grid(quantize(images), len(images)))
    say(f"From left to right in {arguments.output}{'' if seeds else ', the pictures themselves at both ends'}.")


def _read(arguments: _Pictures) -> list[Image.Image]:
    _check_output(arguments.output, arguments.folder)
    if not 1 <= len(arguments.pictures) <= _LARGEST_GRID:
        raise InputError(f"Name the pictures to edit, 1 to {_LARGEST_GRID}; got {len(arguments.pictures)}.")
    return [photos.read(path) for path in arguments.pictures]


def _check_output(output: Path, folder: Path | None) -> None:
    if output.suffix.lower() != ".png":
        raise InputError(f"{output}: the grid is a .png file; --folder is for single pictures.")
    check_writable(output, folder=False)
    if folder is not None:
        check_writable(folder, folder=True)


def _model(arguments: _Edit) -> Model:
    use_compilation_cache(arguments.compilation_cache)
    model = load(resolve(arguments.checkpoint), precision=arguments.precision)
    photos.check_square(model.config.network.image_shape)
    return model


def _tell(paths: Sequence[Path], pictures: Sequence[Image.Image], size: int) -> None:
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
    "repaint": Repaint,
    "denoise": Denoise,
    "interpolate": Interpolate,
}
_EDITS: dict[type[_Edit], Callable[[Any], None]] = {
    Inpaint: _inpaint,
    Colorize: _colourise,
    SuperResolve: _super_resolve,
    Repaint: _repaint,
    Denoise: _denoise,
    Interpolate: _interpolate,
}
