"""Image files: quantization, grids, folders of PNG files, .npz archives."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from cm_jax.io.atomic import atomic_write

Quantization = Literal["round", "truncate"]

_SMALLEST_SHOWN = 64
"""Smaller images are enlarged in a grid, by nearest-neighbor resizing with an integer factor."""


def quantize(images: Float[np.ndarray, "b h w c"], how: Quantization = "round") -> UInt8[np.ndarray, "b h w c"]:
    """[-1, 1] to 0 ... 255, rounded, or truncated as in OpenAI's implementation."""
    scaled = np.clip((images + 1) * 127.5, 0, 255)
    return (np.round(scaled) if how == "round" else scaled).astype(np.uint8)


def fits_png(channels: int, rgba: bool) -> bool:
    """Whether a PNG file can hold images with this many channels. Four are not RGBA unless the user says so."""
    return channels in (1, 3) or (channels == 4 and rgba)


def picture_of(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """A gray, RGB or RGBA picture of 1, 3 or 4 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(
    images: UInt8[np.ndarray, "b h w c"], columns: int, row_names: Sequence[str] = (), gap: int = 2
) -> Image.Image:
    """A grid of images with `columns` columns, and with names to the left of its rows: RGB, or RGBA for 4 channels."""
    count, height, width, channels = images.shape
    zoom = max(1, math.ceil(_SMALLEST_SHOWN / max(height, width)))
    rows = math.ceil(count / columns)
    step_y, step_x = height * zoom + gap, width * zoom + gap
    font = ImageFont.load_default(size=max(12, min(20, step_y // 5)))
    margin = max((math.ceil(font.getlength(name)) + 12 for name in row_names), default=0)
    sheet = Image.new(
        "RGBA" if channels == 4 else "RGB", (margin + columns * step_x + gap, rows * step_y + gap), "white"
    )
    for index, picture in enumerate(images):
        shown = picture_of(picture).convert(sheet.mode).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(shown, (margin + gap + index % columns * step_x, gap + index // columns * step_y))
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names):
        pen.text((margin - 8, gap + row * step_y + height * zoom / 2), name, fill="black", font=font, anchor="rm")
    return sheet


def save_grid(path: Path, image: Image.Image) -> None:
    """Write a PNG file atomically."""
    with atomic_write(path) as beside:
        image.save(beside, "PNG")


def save_folder(path: Path, images: UInt8[np.ndarray, "b h w c"], labels: Int[np.ndarray, " b"] | None) -> None:
    """Write one PNG file per image, 000000.png, or 000000_class145.png with labels; atomically."""
    with atomic_write(path) as beside:
        beside.mkdir()
        for index, picture in enumerate(images):
            suffix = "" if labels is None else f"_class{labels[index]}"
            picture_of(picture).save(beside / f"{index:06d}{suffix}.png")


def save_npz(
    path: Path,
    images: UInt8[np.ndarray, "b h w c"] | Float[np.ndarray, "b h w c"],
    labels: Int[np.ndarray, " b"] | None,
) -> None:
    """Write the archive that OpenAI's evaluator reads: arr_0, NHWC images (uint8; float32 for latents); arr_1, int64
    labels if given.
    """
    with atomic_write(path) as beside:
        arrays = [images] if labels is None else [images, labels.astype(np.int64)]
        with beside.open("wb") as file:
            np.savez(file, *arrays)
