"""Photos of any size: reading, cropping and resizing to a model's images, and pasting edits back."""

import warnings
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cm_jax.data import center_crop, on_white, open_image, with_channels
from cm_jax.editing.operators import Luma
from cm_jax.errors import InputError
from cm_jax.io.images import picture_of
from cm_jax.types import ImageSize, height_width

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""

_MAX_BYTES = 2**28
_WHITE = 224
"""Least value of red, green and blue in white paint."""
_LEAST_SATURATION = 32
"""Difference between the largest and the smallest of red, green and blue in a color."""
_MOST_COLORED = 0.02
"""Largest share of pixels with a color in a mask."""
_MOST_UNCLEAR = 0.25
"""Largest share of middle grays in a mask."""


def read(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB, or as RGBA if pixels are transparent. Raises InputError where that fails."""
    return _decode(*_content(path), _rgb_or_rgba)


def read_mask(path: Path) -> Image.Image:
    """Read an image file for `hole_from_mask`, with its own values. Raises InputError where that fails."""
    return _decode(
        *_content(path), lambda image: _transparent(image) or (image if _is_gray(image) else on_white(image))
    )


def decode(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as 8-bit RGB; `name` identifies it in the InputError."""
    return _decode(content, name, on_white)


def _content(path: Path) -> tuple[bytes, str]:
    """(content of a file, its name for messages)."""
    name = str(path)[:200]
    try:
        path = path.expanduser()
        if not path.is_file():
            raise InputError(f"There is no picture {name}.")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name} cannot be read as a picture: it is larger than {_MAX_BYTES >> 20} MiB.")
        return path.read_bytes(), name
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as a picture: {error}.") from error


def _decode(content: bytes, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` has a lower limit
            return convert(open_image(content))
    except Exception as error:  # image formats raise many kinds
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise InputError(f"{name} cannot be read as a picture: {reason[:200]}.") from error


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")


def _rgb_or_rgba(image: Image.Image) -> Image.Image:
    return _transparent(image) or on_white(image)


def _transparent(image: Image.Image) -> Image.Image | None:
    """The image in RGBA if pixels are transparent, such as those of one gray or color of a PNG file."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # of 16 bits: Pillow's conversion ignores the transparent gray
        layer, opaque = on_white(image), np.asarray(image) != image.info["transparency"]
        layer.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    else:
        layer = image.convert("RGBA")
    return layer if np.asarray(layer)[..., 3].min() < 255 else None


def center_box(width: int, height: int, size: ImageSize = 1) -> Box:
    """The largest part in the center with the aspect ratio of `size`: by default a square."""
    rows, columns = height_width(size)
    if width * rows >= height * columns:
        box_width, box_height = max(1, round(height * columns / rows)), height
    else:
        box_width, box_height = width, max(1, round(width * rows / columns))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def fit(image: Image.Image, size: ImageSize, channels: int = 3) -> Float[np.ndarray, "h w c"]:
    """The center with the aspect ratio of `size`, resized to it like training images; values in [-1, 1].

    channels: 1 (gray on white), 3 (RGB on white) or 4 (RGBA).
    """
    part = center_crop(with_channels(image, channels).crop(center_box(*image.size, size)), size)
    return np.asarray(part, np.float32).reshape(*height_width(size), -1) / 127.5 - 1


def fit_notes(image: Image.Image, size: tuple[int, int]) -> list[str]:
    """How `fit` crops and resizes an image, in words; empty if it does neither."""
    left, top, right, bottom = center_box(*image.size, size)
    part, wanted, notes = (right - left, bottom - top), (size[1], size[0]), []
    if part != image.size:
        notes.append(f"center {part[0]} x {part[1]} of {image.width} x {image.height} pixels")
    if part != wanted:
        before, after = (f"{w} x {h}" if size[0] != size[1] else f"{w}" for w, h in (part, wanted))
        notes.append(f"{'reduced' if part > wanted else 'enlarged'} from {before} to {after} pixels")
    return notes


def fit_patches(image: Image.Image, size: ImageSize, patch: int, channels: int = 3) -> Float[np.ndarray, "h w c"]:
    """The center at size / patch pixels, each repeated patch x patch times: the input of PatchMean(patch)."""
    height, width = height_width(size)
    return fit(image, (height // patch, width // patch), channels).repeat(patch, 0).repeat(patch, 1)


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
    """The pixels of a picture to inpaint: those where the mask is transparent or, if none is, white.

    A transparent mask is a copy of the picture with an erased hole; if all its visible pixels are white, it is paint on
    an empty layer, and the hole is the paint. Of a mask with two values the hole has the higher one. Raises InputError
    unless the mask has the size of the picture, and for other values and empty holes.
    """
    if mask.size != (width, height):
        raise InputError(
            f"Expected a mask of {width} x {height} pixels, the size of the picture; got {mask.width} x {mask.height}."
        )
    if not _is_gray(mask):
        layer = np.asarray(mask.convert("RGBA"))
        visible = layer[..., 3] >= 128
        if not visible.any():
            raise InputError("Expected a mask with visible pixels, got one that is transparent everywhere.")
        if not visible.all():
            painted = layer[visible][:, :3].min() >= _WHITE
            return visible if painted else ~visible
    return _white_pixels(mask)


def _white_pixels(mask: Image.Image) -> Bool[np.ndarray, "h w"]:
    """Values of at least half the maximum, or the higher of two values."""
    values = np.asarray(mask if mask.mode.startswith(("I", "F")) else mask.convert("RGB").convert("L"))
    levels, highest = np.unique(values), 65535 if mask.mode.startswith("I") else 255
    if len(levels) == 2:
        return values == levels[1]
    if len(levels) == 1 and levels[0] in (0, highest):
        if levels[0] == 0:
            raise InputError("Expected a mask with white pixels, where the picture is inpainted; got a black mask.")
        return np.ones(values.shape, bool)
    share, is_colored = values / highest, False
    if not _is_gray(mask):
        saturation = np.ptp(np.asarray(mask.convert("RGB")), axis=-1)
        is_colored = (saturation > _LEAST_SATURATION).mean() > _MOST_COLORED
    unclear = ((share > 0.25) & (share < 0.75)).mean() > _MOST_UNCLEAR
    if share.max() < 0.5 or len(levels) == 1 or is_colored or unclear:
        few = ", ".join(f"{level:g}" for level in levels) if len(levels) <= 10 else f"{levels[0]:g} to {levels[-1]:g}"
        raise InputError(
            "Expected a mask that is black, and white where to inpaint, or has two values or a transparent hole; got "
            f"{'colors of brightness' if is_colored else 'the gray values'} {few}. Make the pixels to inpaint white "
            "and all others black."
        )
    return share >= 0.5


def fit_hole(hole: Bool[np.ndarray, "h w"], size: ImageSize) -> Bool[np.ndarray, "r s"]:
    """The pixels of the center, at `size`, that the hole touches. Raises InputError if there are none."""
    whole, (height, width) = Image.fromarray(hole.astype(np.uint8)).convert("F"), height_width(size)
    part = whole.crop(center_box(*whole.size, size))
    touched = np.asarray(part.resize((width, height), Image.Resampling.BOX)) > 0
    if not touched.any():
        center = "center square" if height == width else f"center {width} : {height}"
        raise InputError(f"Expected a hole inside the {center}, which the model edits; crop the picture first.")
    return touched


def paste_back(
    image: Image.Image,
    edited: UInt8[np.ndarray, "r s c"],
    hole: Bool[np.ndarray, "h w"] | None = None,
    *,
    colors_only: bool = False,
) -> Image.Image:
    """The picture at its own size with the edited part in its center, or only the edited pixels of a hole, or only the
    colors of the edit.

    It has the channels of the edits. With gray or RGB edits, a transparent picture (RGBA) stays transparent; the pixels
    of a hole become opaque.
    """
    left, top, right, bottom = box = center_box(*image.size, (edited.shape[0], edited.shape[1]))
    part = picture_of(edited).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    if colors_only:
        part = _with_luma(on_white(image.crop(box)), part)
    transparent = image.mode == "RGBA" and part.mode != "RGBA"
    whole = image.copy() if transparent else image.convert(part.mode)
    if hole is None and transparent:
        part = _behind(part.convert("RGB"), image.crop(box))
    mask = None if hole is None else Image.fromarray(hole.astype(np.uint8) * 255).crop(box)
    whole.paste(part.convert(whole.mode), (left, top), mask)
    return whole


def _with_luma(picture: Image.Image, colors: Image.Image) -> Image.Image:
    """The RGB image with the luma of one and the colors of another, less saturated where a value would leave 8 bits."""
    both = np.stack([np.asarray(image, np.float32) for image in (picture, colors)])
    luma, own = np.asarray(Luma().preview(jnp.asarray(both)))
    chroma = both[1] - own
    room = np.where(chroma > 0, 255 - luma, luma) / np.maximum(np.abs(chroma), 1e-6)
    pixels = luma + np.minimum(1, room.min(-1, keepdims=True)) * chroma
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _behind(square: Image.Image, transparent: Image.Image) -> Image.Image:
    """The RGBA image with the transparency of `transparent` that looks like `square` on white."""
    before = np.asarray(transparent).astype(np.float32)
    alpha = before[..., 3:] / 255
    color = 255 - (255 - np.asarray(square, np.float32)) / np.maximum(alpha, 1 / 255)
    kept = np.where(alpha > 0, np.clip(np.round(color), 0, 255), before[..., :3])
    return Image.fromarray(np.concatenate([kept, before[..., 3:]], axis=-1).astype(np.uint8))
