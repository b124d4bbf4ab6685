"""Draw the pictures of docs/gallery.md: python -m tools.gallery [--model runs/emoji32-cd] [--teacher runs/emoji32-edm]

Everything is drawn from seed 0 or from the seeds that stand below, and nothing is left out because of how it looks. The
pictures that are edited are held-out emoji (Noto, by code point) and the two drawings in docs/images/emoji.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from cm_jax.checkpoints.published import DEFAULT
from cm_jax.data.emoji import bundled
from cm_jax.editing import Luma, Mask, Noisy, Operator, PatchMean, Strokes, photos
from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write
from cm_jax.io.images import grid, quantize
from cm_jax.model import Model, load

Images = Float[np.ndarray, "b h w c"]

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
TEACHER_STEPS = 18
SEEDS = (0, 1)
"""Of the noise that one step, two steps and the teacher begin with."""
VARIANTS = 6
PICTURES = {
    "cat": "1F63D",
    "hamster": "1F439",
    "mango": "1F96D",
    "globe": "1F30E",
    "bear": "1F9F8",
    "flag": "1F1E7-1F1F4",
}
BETWEEN = (("1F60F", "1F63D"), ("1F439", "1F430"), ("1F30E", "1F31F"), ("1F1E6-1F1F9", "1F1E7-1F1F4"))
"""Pairs of a class each: a smirk and a cat, a hamster and a rabbit, the globe and a star, two flags."""
NOISES = ((0, 0, 1), (2, 2, 3), (3, 4, 5), (8, 5, 6))
"""(class, one seed, another)."""
SIGMAS = (0.25, 0.5, 1.0, 2.0)
DRAWINGS = {"strokes_face": 0, "strokes_flag": 8}
"""And the class of each."""
_SIDE, _GAP = 96, 2
_LARGEST = 300_000
"""Bytes of a picture."""


def classes(model: Model) -> Image.Image:
    """Every class, in two steps."""
    names, columns = model.config.class_names, 8
    images = model.sample(0, len(names) * columns, labels=np.repeat(np.arange(len(names)), columns), steps=2)
    return sheet(images, columns, names)


def steps(model: Model, teacher: Model | None) -> Image.Image:
    """One image of every class: in one step, in two, and by the teacher, all from the same noise."""
    names = model.config.class_names
    ways = {"one step": (model, 1), "two steps": (model, 2)}
    if teacher is not None:
        ways[f"teacher, {TEACHER_STEPS} steps"] = (teacher, TEACHER_STEPS)
    rows = [
        drawing.sample(seed, len(names), labels=range(len(names)), steps=number)
        for seed in SEEDS
        for drawing, number in ways.values()
    ]
    return sheet(np.concatenate(rows), len(names), list(ways) * len(SEEDS), [name.split()[0] for name in names])


def noises(model: Model, frames: int = 9) -> Image.Image:
    """From the noise of one image to that of another, in two steps."""
    rows = [model.interpolate_noise(one, two, frames, labels=label, steps=2) for label, one, two in NOISES]
    return sheet(np.concatenate(rows), frames, [model.config.class_names[label] for label, _, _ in NOISES])


def pictures(model: Model, frames: int = 7) -> Image.Image:
    """From one picture to another, both of them at the ends."""
    rows = []
    for pair in BETWEEN:
        (first, second), labels = emoji(pair, model)
        between = model.interpolate_images(0, first, second, frames, labels=labels[:1])
        rows.append(np.stack([first, *between, second]))
    return sheet(np.concatenate(rows), frames + 2, headings=["given", *[""] * frames, "given"])


def edits(model: Model, operator: Operator, known: str) -> Image.Image:
    """Every picture, what is known of it, and edits of it."""
    given, labels = emoji(PICTURES.values(), model)
    edited = model.edit(0, given, operator, labels=labels, variants=VARIANTS)
    columns = [given, np.asarray(operator.shown(jnp.asarray(given))), *by_variant(edited, len(given))]
    return sheet(across(columns), len(columns), list(PICTURES), ["given", known, "edits"])


def inpainted(model: Model) -> Image.Image:
    """The lower part of every picture painted anew."""
    size = model.config.network.image_size
    hole = photos.hole_in((size // 8, size // 2, size - size // 8, size), size, size)
    return edits(model, Mask(np.repeat(~hole[None, ..., None], len(PICTURES), 0)), "known")


def repainted(model: Model) -> Image.Image:
    """Pictures like a drawing of a few strokes."""
    size = model.config.network.image_size
    drawn = [photos.fitted(photos.read(IMAGES / "emoji" / f"{name}.png"), size) for name in DRAWINGS]
    edited = model.edit(0, np.stack(drawn), Strokes(), labels=list(DRAWINGS.values()), variants=VARIANTS + 1)
    columns = [np.stack(drawn), *by_variant(edited, len(drawn))]
    return sheet(across(columns), len(columns), ["a face", "a flag"], ["given", "edits"])


def denoised(model: Model) -> Image.Image:
    """Every picture under noise of growing deviation, and without it, by one call of the network each."""
    given, labels = emoji(PICTURES.values(), model)
    noise = np.random.default_rng(0).standard_normal(given.shape, np.float32)
    columns, headings = [given], ["given"]
    for sigma in SIGMAS:
        noisy = given + sigma * noise
        columns += [noisy, model.edit(0, noisy, Noisy(), labels=labels, sigmas=(sigma,))]
        headings += [f"sigma {sigma:g}", "denoised"]
    return sheet(across(columns), len(columns), list(PICTURES), headings)


def emoji(codes: Iterable[str], model: Model) -> tuple[Images, list[int]]:
    """Noto's emoji of these code points at the model's size, and their classes."""
    arrays, size = bundled(), model.config.network.image_size
    found = [np.flatnonzero((arrays["unified"] == code) & (arrays["vendor"] == 0))[0] for code in codes]
    shown = [photos.fitted(Image.fromarray(arrays["images"][index]), size) for index in found]
    return np.stack(shown), [int(arrays["labels"][index]) for index in found]


def by_variant(edited: Images, given: int) -> list[Images]:
    """The first edit of every picture, then the second of every one, and so on."""
    return list(np.moveaxis(edited.reshape(given, -1, *edited.shape[1:]), 1, 0))


def across(columns: Sequence[Images]) -> Images:
    """Columns of images as the rows of a sheet, one after the other."""
    return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def sheet(images: Images, columns: int, row_names: Sequence[str] = (), headings: Sequence[str] = ()) -> Image.Image:
    """A grid of images enlarged to some 96 pixels, with names at the left and headings above the columns."""
    zoom = _SIDE // images.shape[1]
    rows = grid(quantize(images).repeat(zoom, 1).repeat(zoom, 2), columns, row_names, _GAP)
    if not headings:
        return rows
    font, step = ImageFont.load_default(size=16), images.shape[2] * zoom + _GAP
    whole = Image.new("RGB", (rows.width, rows.height + 24), "white")
    whole.paste(rows, (0, 24))
    left, pen = rows.width - columns * step, ImageDraw.Draw(whole)
    for number, heading in enumerate(headings):
        pen.text((left + number * step, 20), heading, fill="black", font=font, anchor="ls")
    return whole


def check(model: Model, teacher: Model | None) -> None:
    """Raise InputError unless these are a consistency model of the emoji, and a denoiser of the same size."""
    config, size = model.config, model.config.network.image_size
    names = tuple(bundled()["class_names"].tolist())
    if not config.distilled or config.class_names != names or _SIDE % size:
        raise InputError("The gallery is of a consistency model of the bundled emoji, of 16, 32 or 48 pixels.")
    if teacher is not None and (teacher.config.distilled or teacher.config.network.image_size != size):
        raise InputError(f"The teacher must be a denoiser of the same images, {size} x {size}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help=f"a checkpoint, or a bundled one; default: {DEFAULT}")
    parser.add_argument("--teacher", help="the denoiser it was distilled from; without one its rows are left out")
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the pictures go; default: docs/images")
    arguments = parser.parse_args()
    try:
        model = load(arguments.model)
        teacher = load(arguments.teacher) if arguments.teacher else None
        check(model, teacher)
    except InputError as error:
        parser.error(str(error))
    drawn = {
        "classes": lambda: classes(model),
        "steps": lambda: steps(model, teacher),
        "noises": lambda: noises(model),
        "pictures": lambda: pictures(model),
        "inpaint": lambda: inpainted(model),
        "colorize": lambda: edits(model, Luma(), "known"),
        "superres": lambda: edits(model, PatchMean(4), "known"),
        "strokes": lambda: repainted(model),
        "denoise": lambda: denoised(model),
    }
    for name, draw in drawn.items():
        path = arguments.folder / f"gallery_{name}.png"
        with atomic_write(path) as beside:
            draw().save(beside, "PNG", optimize=True)
        size = path.stat().st_size
        print(f"{path.name}: {size:,} bytes{', too large for a page' if size > _LARGEST else ''}", flush=True)


if __name__ == "__main__":
    main()
