"""From the bytes of an image file to a square of pixels, as the original makes it."""

import contextlib
import io

import numpy as np
from jaxtyping import UInt8
from PIL import (
    Image,
    ImageOps,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  registers its reader, which Pillow by itself does too late
)

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""By content, whatever the file is called. Pillow's other readers stay shut: one of them starts another program."""
_MOST_PIXELS = 2**26
"""Larger images are refused before they are unpacked: a small file may claim any size."""


def decode(encoded: bytes, image_size: int) -> tuple[UInt8[np.ndarray, "h w 3"], bool]:
    """(the image, centre-cropped to `image_size`; whether it was smaller and had to be enlarged).

    Raises as `picture` does.
    """
    whole = picture(encoded)
    return np.asarray(centre_crop(whole, image_size)), min(whole.size) < image_size


def picture(encoded: bytes) -> Image.Image:
    """The image in red, green and blue of 8 bits.

    Turned as its EXIF says, transparent parts on white, 16 bits brought to 8, of an animation the first frame. Raises
    whatever Pillow raises for a damaged file, which is every kind of exception.
    """
    with _opened(encoded) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {_MOST_PIXELS}")
        image.load()
        with contextlib.suppress(Exception):  # a damaged EXIF does not make a bad image
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Halved by BOX while the shorter side is at least twice too long, then scaled by BICUBIC until it fits, and cut.

    This is what the published models were trained on (openai/consistency_models, cm/image_datasets.py), pixel by pixel.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is not of the formats {', '.join(_FORMATS)}, or its beginning is damaged") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
