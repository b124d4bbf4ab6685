"""Image files: quantization, grids, folders of PNG files, .npz archives."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from cm_jax.arguments import as_array, as_images, as_list
from cm_jax.errors import InputError, check_int, nearest, one_line
from cm_jax.io.atomic import atomic_write, check_writable, user_path

Quantization = Literal["round", "truncate"]
AnyImages = Float[Array | np.ndarray, "b h w c"] | UInt8[Array | np.ndarray, "b h w c"]
"""Images in [-1, 1], or 0 ... 255."""

LARGEST_GRID = 4096
"""Images in a grid."""

_SMALLEST_SHOWN = 64
"""Smaller images are enlarged in a grid, by nearest-neighbor resizing with an integer factor."""


def quantize(images: Float[np.ndarray, "b h w c"], how: Quantization = "round") -> UInt8[np.ndarray, "b h w c"]:
    """[-1, 1] to 0 ... 255, rounded, or truncated as in OpenAI's implementation."""
    scaled = np.clip((images + 1) * 127.5, 0, 255)
    return (np.round(scaled) if how == "round" else scaled).astype(np.uint8)


def check_finite(images: Float[np.ndarray, "b h w c"], name: str = "") -> Float[np.ndarray, "b h w c"]:
    """The same images; `name` says of what. Raises InputError if any pixel is NaN or infinite."""
    bad = int((~np.isfinite(images).all((1, 2, 3))).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(images)} images{f' of {name}' if name else ''} have NaN or infinite pixels: the network "
            "diverged or its weights are damaged. Use another checkpoint."
        )
    return images


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


def image_grid(images: AnyImages, columns: int | None = None, *, rgba: bool = False) -> Image.Image:
    """The images as one Pillow image, which notebooks show; small images are enlarged.

    images: NHWC of 1 or 3 channels, or of 4 with `rgba`; floats in [-1, 1] or uint8. columns: by default a square.
    """
    pixels = _eight_bits(images, "round")
    if not fits_png(channels := pixels.shape[3], rgba):
        advice = "if they are RGBA, give rgba=True" if channels == 4 else "select 1 or 3 of them"
        raise InputError(f"Expected gray or RGB images, got {channels} channels: {advice}.")
    check_int("The number of images in a grid", len(pixels), 1, LARGEST_GRID)
    return grid(pixels, _columns(columns, len(pixels)))


def save_images(
    images: AnyImages,
    path: str | Path,
    *,
    labels: Sequence[int] | Int[Array | np.ndarray, " b"] | None = None,
    columns: int | None = None,
    row_names: Sequence[str] = (),
    rgba: bool = False,
    quantization: Quantization | None = "round",
) -> Path:
    """Write images and return the path: NAME.png for a grid, NAME.npz for arr_0 (images) and arr_1 (labels), any other
    name for a folder with a PNG file for each image.

    images: NHWC, floats in [-1, 1] or uint8. An .npz file is written in place of PNG files unless the images have 1 or
    3 channels, or 4 with `rgba`. columns, row_names: of the grid, by default a square without names. quantization:
    conversion of floats to 8 bits; None stores them in an .npz file as they are, for latents. Raises InputError.
    """
    if quantization not in (choices := (*get_args(Quantization), None)):
        advice = nearest(quantization, choices[:-1])
        raise InputError(f"quantization must be 'round', 'truncate' or None, got {one_line(quantization)}.{advice}")
    pixels = _checked(images) if quantization is None else _eight_bits(images, quantization)
    path = output_path(user_path(path), 0 if quantization is None else pixels.shape[3], rgba)
    check_output(path, len(pixels))
    numbers = None if labels is None else _checked_labels(labels, len(pixels))
    match path.suffix.lower():
        case ".png":
            width = _columns(columns, len(pixels))
            save_grid(path, grid(pixels, width, _checked_names(row_names, math.ceil(len(pixels) / width))))
        case ".npz":
            save_npz(path, pixels, numbers)
        case _:
            save_folder(path, pixels, numbers)
    return path


def output_path(path: Path, channels: int, rgba: bool) -> Path:
    """`path`, or the .npz file in its place if PNG files cannot hold images with this many channels."""
    suffix = path.suffix.lower()
    if suffix == ".npz" or fits_png(channels, rgba):
        return path
    if path.name in ("", ".."):
        raise InputError(f"Expected a file or folder to write, got {str(path)!r}.")
    return path.with_suffix(".npz") if suffix == ".png" else path.with_name(f"{path.name}.npz")


def check_output(path: Path, count: int | None) -> None:
    """Raise InputError for a path that cannot be written, a format that is not supported, and too large a grid."""
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy"):
        raise InputError(f"{path}: {suffix} files are not supported; use a .png file, an .npz file or a folder.")
    if suffix == ".png" and (count or 0) > LARGEST_GRID:
        raise InputError(
            f"A grid of {count} images is too large, at most {LARGEST_GRID}: use an .npz file or a folder."
        )
    check_writable(path, folder=suffix not in (".png", ".npz"))


def _checked(images: Any) -> np.ndarray:
    """Images NHWC, floats or uint8, as a NumPy array."""
    array = as_array("images", images)
    array = np.asarray(array if array.dtype == np.uint8 else as_images(array))
    if array.ndim != 4 or not array.size:
        raise InputError(f"Expected images [b, h, w, c], got shape {list(array.shape)}.")
    return array if array.dtype == np.uint8 else check_finite(array.astype(np.float32))


def _eight_bits(images: Any, how: Quantization) -> UInt8[np.ndarray, "b h w c"]:
    array = _checked(images)
    return array if array.dtype == np.uint8 else quantize(array, how)


def _checked_labels(labels: Any, count: int) -> Int[np.ndarray, " b"]:
    array = np.asarray(as_array("labels", labels))
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"Expected {count} class numbers as labels, got {array.dtype} {list(array.shape)}.")
    return array


def _checked_names(names: Any, rows: int) -> list[str]:
    listed = as_list(names)
    if listed is None or len(listed) not in (0, rows) or not all(isinstance(name, str) for name in listed):
        raise InputError(f"Expected a list of {rows} strings as row_names, got {one_line(names)}.")
    return listed


def _columns(given: int | None, count: int) -> int:
    return max(1, round(count**0.5)) if given is None else check_int("columns", given, 1, LARGEST_GRID)


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
