"""Generate the images of docs/gallery.md: python -m tools.gallery [--model runs/emoji32-cd] [--teacher RUN]

All images come from seed 0 or from the seeds below, without selection. The edited pictures are held-out emoji (Noto, by
code point) and the two sketches in docs/images/emoji.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from cm_jax.checkpoints.published import DEFAULT
from cm_jax.data.npz import bundled_emoji, resized
from cm_jax.editing import Luma, Mask, Noisy, Operator, PatchMean, Strokes, photos
from cm_jax.errors import InputError
from cm_jax.evaluation import nearest
from cm_jax.feature_networks.lpips import LPIPS
from cm_jax.io.atomic import atomic_write
from cm_jax.io.images import grid, quantize
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.types import Params

Images = Float[np.ndarray, "b h w c"]

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
TEACHER_STEPS = 18
SEEDS = (0, 1)
"""Seeds of the initial noise of one step, two steps and the teacher."""
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
"""Pairs of the same class: a smirk and a cat, a hamster and a rabbit, the globe and a star, two flags."""
NOISES = ((0, 0, 1), (2, 2, 3), (3, 4, 5), (8, 5, 6))
"""(class, seed, seed)."""
SIGMAS = (0.25, 0.5, 1.0, 2.0)
SKETCHES = {"strokes_face": 0, "strokes_flag": 8}
"""Sketches and their classes."""
_SIDE, _GAP = 96, 2
_MAX_BYTES = 300_000
"""Size of an image file above which a warning is printed."""


def classes(model: Model) -> Image.Image:
    """Eight images of each class, two steps."""
    names, columns = model.config.class_names, 8
    images = model.sample(0, len(names) * columns, labels=np.repeat(np.arange(len(names)), columns), steps=2)
    return sheet(images, columns, names)


def steps(model: Model, teacher: Model | None) -> Image.Image:
    """One image per class by one step, two steps and the teacher, from the same noise."""
    names = model.config.class_names
    samplers = {"one step": (model, 1), "two steps": (model, 2)}
    if teacher is not None:
        samplers[f"teacher, {TEACHER_STEPS} steps"] = (teacher, TEACHER_STEPS)
    rows = [
        network.sample(seed, len(names), labels=range(len(names)), steps=count)
        for seed in SEEDS
        for network, count in samplers.values()
    ]
    return sheet(np.concatenate(rows), len(names), list(samplers) * len(SEEDS), [name.split()[0] for name in names])


def noises(model: Model, frames: int = 9) -> Image.Image:
    """Interpolations between the noise of two seeds, two steps."""
    rows = [model.interpolate_noise(one, two, frames, labels=label, steps=2) for label, one, two in NOISES]
    return sheet(np.concatenate(rows), frames, [model.config.class_names[label] for label, _, _ in NOISES])


def pictures(model: Model, frames: int = 7) -> Image.Image:
    """Interpolations between two pictures, which are shown at the ends."""
    rows = []
    for pair in BETWEEN:
        (first, second), labels = emoji(pair, model)
        between = model.interpolate_images(0, first, second, frames, labels=labels[:1])
        rows.append(np.stack([first, *between, second]))
    return sheet(np.concatenate(rows), frames + 2, headings=["given", *[""] * frames, "given"])


def edits(model: Model, operator: Operator, known: str) -> Image.Image:
    """Each picture, its known part and edits of it."""
    given, labels = emoji(PICTURES.values(), model)
    edited = model.edit(0, given, operator, labels=labels, variants=VARIANTS)
    columns = [given, np.asarray(operator.preview(jnp.asarray(given))), *by_variant(edited, len(given))]
    return sheet(across(columns), len(columns), list(PICTURES), ["given", known, "edits"])


def inpainted(model: Model) -> Image.Image:
    """Each picture with its lower half inpainted."""
    size = model.config.network.image_shape[0]
    hole = photos.hole_from_box((size // 8, size // 2, size - size // 8, size), size, size)
    return edits(model, Mask(np.repeat(~hole[None, ..., None], len(PICTURES), 0)), "known")


def strokes(model: Model) -> Image.Image:
    """Stroke-based edits of the sketches."""
    size = model.config.network.image_shape[0]
    sketches = [photos.fit(photos.read(IMAGES / "emoji" / f"{name}.png"), size) for name in SKETCHES]
    edited = model.edit(0, np.stack(sketches), Strokes(), labels=list(SKETCHES.values()), variants=VARIANTS + 1)
    columns = [np.stack(sketches), *by_variant(edited, len(sketches))]
    return sheet(across(columns), len(columns), ["a face", "a flag"], ["given", "edits"])


def denoised(model: Model) -> Image.Image:
    """Each picture with noise of growing standard deviation, and denoised by one network evaluation."""
    given, labels = emoji(PICTURES.values(), model)
    noise = np.random.default_rng(0).standard_normal(given.shape, np.float32)
    columns, headings = [given], ["given"]
    for sigma in SIGMAS:
        noisy = given + sigma * noise
        columns += [noisy, model.edit(0, noisy, Noisy(), labels=labels, sigmas=(sigma,))]
        headings += [f"sigma {sigma:g}", "denoised"]
    return sheet(across(columns), len(columns), list(PICTURES), headings)


def neighbors(model: Model, lpips: Params | None) -> Image.Image:
    """Sixteen one-step samples, each above its nearest training image by pixels and, with weights, by LPIPS.

    Prints the median distances of 431 samples beside those of the 431 held-out images.
    """
    arrays, size = bundled_emoji(), model.config.network.image_shape[0]
    train, held_out = (resized(arrays["images"][arrays["held_out"] == part], size) for part in (False, True))
    samples = quantize(model.sample(0, len(held_out), labels=arrays["labels"][arrays["held_out"]], steps=1))
    rows, names = [samples[:: len(samples) // 16][:16]], ["sample"]
    for name, weights in [("pixels", None), ("LPIPS", lpips)][: 1 + bool(lpips)]:
        found = nearest(samples, train, weights)
        medians = np.median(found.distances), np.median(nearest(held_out, train, weights).distances)
        print(f"Median distance to the nearest training image ({name}): ", end="")
        print(f"{medians[0]:.3g} of samples, {medians[1]:.3g} of held-out images.")
        rows.append(train[found.indices[:: len(samples) // 16][:16]])
        names.append(f"nearest by {name}")
    return sheet(np.concatenate(rows) / 127.5 - 1, 16, names)


def emoji(codes: Iterable[str], model: Model) -> tuple[Images, list[int]]:
    """The Noto emoji of these code points at the model's size, and their classes."""
    arrays, size = bundled_emoji(), model.config.network.image_shape[0]
    found = [np.flatnonzero((arrays["unified"] == code) & (arrays["vendor"] == 0))[0] for code in codes]
    shown = [photos.fit(Image.fromarray(arrays["images"][index]), size) for index in found]
    return np.stack(shown), [int(arrays["labels"][index]) for index in found]


def by_variant(edited: Images, given: int) -> list[Images]:
    """Edits [pictures * variants, ...] as a list of variants [pictures, ...]."""
    return list(np.moveaxis(edited.reshape(given, -1, *edited.shape[1:]), 1, 0))


def across(columns: Sequence[Images]) -> Images:
    """Columns of images in the row-major order of a sheet."""
    return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def sheet(images: Images, columns: int, row_names: Sequence[str] = (), headings: Sequence[str] = ()) -> Image.Image:
    """A grid of images enlarged to at most 96 pixels, with row names at the left and headings above the columns."""
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
    """Raise InputError unless the model is a consistency model of the emoji and the teacher a denoiser of its size."""
    config, size = model.config, model.config.network.image_shape[0]
    names = tuple(bundled_emoji()["class_names"].tolist())
    if not config.distilled or config.class_names != names or _SIDE % size:
        raise InputError("Expected a consistency model of the bundled emoji with 16, 32 or 48 pixels.")
    if teacher is not None and (teacher.config.distilled or teacher.config.network.image_shape[0] != size):
        raise InputError(f"Expected a teacher that is a denoiser of {size} x {size} pixels.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help=f"checkpoint or bundled model; default: {DEFAULT}")
    parser.add_argument("--teacher", help="denoiser whose samples are shown too; default: none")
    parser.add_argument("--folder", type=Path, default=IMAGES, help="output folder; default: docs/images")
    parser.add_argument("--only", help="one figure, such as neighbors; default: all")
    arguments = parser.parse_args()
    try:
        model = load(arguments.model)
        teacher = load(arguments.teacher) if arguments.teacher else None
        check(model, teacher)
        lpips = LPIPS().load_weights() if os.environ.get("CM_JAX_LPIPS") else None
    except InputError as error:
        parser.error(str(error))
    figures = {
        "classes": lambda: classes(model),
        "steps": lambda: steps(model, teacher),
        "noises": lambda: noises(model),
        "pictures": lambda: pictures(model),
        "inpaint": lambda: inpainted(model),
        "colorize": lambda: edits(model, Luma(), "known"),
        "superres": lambda: edits(model, PatchMean(4), "known"),
        "strokes": lambda: strokes(model),
        "denoise": lambda: denoised(model),
        "neighbors": lambda: neighbors(model, lpips),
    }
    if arguments.only not in (None, *figures):
        parser.error(f"Expected --only with one of {', '.join(figures)}, got {arguments.only}.")
    for name, figure in figures.items() if arguments.only is None else [(arguments.only, figures[arguments.only])]:
        path = arguments.folder / f"gallery_{name}.png"
        with atomic_write(path) as temporary:
            figure().save(temporary, "PNG", optimize=True)
        size = path.stat().st_size
        print(f"{path.name}: {size:,} bytes{', too large for the page' if size > _MAX_BYTES else ''}", flush=True)


if __name__ == "__main__":
    main()
