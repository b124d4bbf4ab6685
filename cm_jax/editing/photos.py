"""Photos of any size: reading, cropping and resizing to a model's images, and pasting edits back."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cm_jax.data import center_crop, read_image
from cm_jax.errors import InputError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""

_MAX_BYTES = 2**28


def read(path: Path) -> Image.Image:
    """Read an image file. Raises InputError where that fails."""
    name = str(path)[:200]
    try:
        path = path.expanduser()
        if not path.is_file():
            raise InputError(f"There is no picture {name}.")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name} cannot be read as a picture: it is larger than {_MAX_BYTES >> 20} MiB.")
        content = path.read_bytes()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as a picture: {error}.") from error
    return decode(content, name)


def decode(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file with `cm_jax.data.picture`; `name` identifies it in the InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `picture` has a lower limit
            return read_image(content)
    except Exception as error:  # image formats raise many kinds
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise InputError(f"{name} cannot be read as a picture: {reason[:200]}.") from error


def check_square(shape: tuple[int, int, int]) -> int:
    """The side of a model's images. Raises InputError unless they are square RGB images."""
    height, width, channels = shape
    if height != width or channels != 3:
        raise InputError(f"Expected a model with square RGB images to edit photos, got images {list(shape)}.")
    return height


def center_box(width: int, height: int) -> Box:
    """The largest square in the center."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def fit(image: Image.Image, size: int) -> Float[np.ndarray, "h w 3"]:
    """The center square, resized to `size` pixels like training images; values in [-1, 1]."""
    square = center_crop(image.crop(center_box(*image.size)), size)
    return np.asarray(square, np.float32) / 127.5 - 1


def fit_patches(image: Image.Image, size: int, patch: int) -> Float[np.ndarray, "h w 3"]:
    """The center square at size / patch pixels, each repeated patch x patch times: the input of PatchMean(patch)."""
    return fit(image, size // patch).repeat(patch, 0).repeat(patch, 1)


def hole_from_box(box: Box, width: int, height: int) -> Bool[np.ndarray, "h w"]:
    """The pixels of a picture that a box covers. Raises InputError unless it lies inside and is not empty."""
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"Expected a box left,top,right,bottom with 0 <= left < right <= {width} and 0 <= top < bottom <= "
            f"{height}, inside the picture; got {','.join(map(str, box))}."
        )
    hole = np.zeros((height, width), bool)
    hole[top:bottom, left:right] = True
    return hole


def hole_from_mask(mask: Image.Image, width: int, height: int) -> Bool[np.ndarray, "h w"]:
    """The white pixels of a mask. Raises InputError unless it has the size of the picture and some white pixels."""
    if mask.size != (width, height):
        raise InputError(
            f"Expected a mask of {width} x {height} pixels, the size of the picture; got {mask.width} x {mask.height}."
        )
    hole = np.asarray(mask.convert("L")) >= 128
    if not hole.any():
        raise InputError("Expected a mask with white pixels, where the picture is inpainted; got a black mask.")
    return hole


def fit_hole(hole: Bool[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "s s"]:
    """The pixels of the center square, at `size` pixels, that the hole touches. Raises InputError if there are none."""
    whole = Image.fromarray(hole.astype(np.uint8)).convert("F").crop(center_box(hole.shape[1], hole.shape[0]))
    touched = np.asarray(whole.resize((size, size), Image.Resampling.BOX)) > 0
    if not touched.any():
        raise InputError("Expected a hole inside the center square, which the model edits; crop the picture first.")
    return touched


def paste_back(
    image: Image.Image, edited: UInt8[np.ndarray, "s s 3"], hole: Bool[np.ndarray, "h w"] | None = None
) -> Image.Image:
    """The picture at its own size with the edited square in its center, or only the edited pixels of a hole."""
    box = center_box(*image.size)
    side = box[2] - box[0]
    square = Image.fromarray(edited).resize((side, side), Image.Resampling.BICUBIC)
    whole = image.copy()
    mask = None if hole is None else Image.fromarray(hole.astype(np.uint8) * 255).crop(box)
    whole.paste(square, box[:2], mask)
    return whole
