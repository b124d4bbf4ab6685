"""Pictures of any size, fitted to a model's square and back again."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cm_jax.data import centre_crop, picture
from cm_jax.errors import InputError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels; right and bottom lie just outside."""

_MOST_BYTES = 2**28


def read(path: Path) -> Image.Image:
    """The picture in a file. Raises InputError for one that cannot be read."""
    name = str(path)[:200]
    try:
        path = path.expanduser()
        if not path.is_file():
            raise InputError(f"There is no picture {name}.")
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{name} cannot be read as a picture: it is larger than {_MOST_BYTES >> 20} MiB.")
        content = path.read_bytes()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as a picture: {error}.") from error
    return decoded(content, name)


def decoded(content: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes, as `cm_jax.data.picture` reads it. Raises InputError, with the file's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `picture` refuses smaller ones already
            return picture(content)
    except Exception as error:  # every image format has its own kinds for a damaged file
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise InputError(f"{name} cannot be read as a picture: {reason[:200]}.") from error


def square_side(shape: tuple[int, int, int]) -> int:
    """The side of a model's images. Raises InputError unless they are squares in red, green and blue."""
    height, width, channels = shape
    if height != width or channels != 3:
        raise InputError(f"Pictures are fitted to squares of three channels, and this model's are {list(shape)}.")
    return height


def middle(width: int, height: int) -> Box:
    """The largest square in the middle."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def to_pixels(image: Image.Image) -> Float[np.ndarray, "h w 3"]:
    """8 bits to [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1


def fitted(image: Image.Image, size: int) -> Float[np.ndarray, "h w 3"]:
    """The square in its middle, scaled to `size` pixels as the images were that models are trained on."""
    return to_pixels(centre_crop(image.crop(middle(*image.size)), size))


def enlarged(image: Image.Image, size: int, patch: int) -> Float[np.ndarray, "h w 3"]:
    """The same at size / patch pixels, each of them then a patch of size x size: what PatchMean(patch) knows."""
    return fitted(image, size // patch).repeat(patch, 0).repeat(patch, 1)


def told(image: Image.Image, name: str, size: int) -> str:
    """What fitting does to a picture, in a line; empty where it does nothing."""
    side = min(image.size)
    cut = f"the middle {side} x {side} of its {image.width} x {image.height} pixels" if side != max(image.size) else ""
    scaled = f"{'reduced' if side > size else 'enlarged'} from {side} to {size} pixels" if side != size else ""
    return f"{name}: {', '.join(part for part in (cut, scaled) if part)}." if cut or scaled else ""


def hole_in(box: Box, width: int, height: int) -> Bool[np.ndarray, "h w"]:
    """What a box covers of a picture. Raises InputError unless it lies inside and is not empty."""
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"The box {','.join(map(str, box))} must be left,top,right,bottom with left < right <= {width} and "
            f"top < bottom <= {height}, the size of the picture."
        )
    hole = np.zeros((height, width), bool)
    hole[top:bottom, left:right] = True
    return hole


def hole_of(mask: Image.Image, width: int, height: int) -> Bool[np.ndarray, "h w"]:
    """What is white in a mask. Raises InputError unless it has the picture's size, and some white."""
    if mask.size != (width, height):
        raise InputError(
            f"The mask has {mask.width} x {mask.height} pixels and the picture {width} x {height}: draw it on the "
            "picture, white where it is to be painted anew."
        )
    hole = np.asarray(mask.convert("L")) >= 128
    if not hole.any():
        raise InputError("The mask is black all over: make white what is to be painted anew.")
    return hole


def fitted_hole(hole: Bool[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "s s"]:
    """The hole in the middle square at `size` pixels: every one that it touches. InputError where it touches none."""
    whole = Image.fromarray(hole.astype(np.uint8)).convert("F").crop(middle(hole.shape[1], hole.shape[0]))
    touched = np.asarray(whole.resize((size, size), Image.Resampling.BOX)) > 0
    if not touched.any():
        raise InputError("The hole lies outside of the middle square, all that the model sees: crop the picture first.")
    return touched


def back(
    image: Image.Image, edited: UInt8[np.ndarray, "s s 3"], hole: Bool[np.ndarray, "h w"] | None = None
) -> Image.Image:
    """The picture at its own size, with the edited square in its middle; of a hole, in the hole alone."""
    box = middle(*image.size)
    square = Image.fromarray(edited)
    side = box[2] - box[0]
    if square.width != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    whole = image.copy()
    mask = None if hole is None else Image.fromarray(hole.astype(np.uint8) * 255).crop(box)
    whole.paste(square, box[:2], mask)
    return whole
