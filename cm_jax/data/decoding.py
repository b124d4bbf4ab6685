"""Decoding and center-cropping of image files, as in OpenAI's implementation."""

import contextlib
import io

import numpy as np
import PIL.TiffImagePlugin
import PIL.WebPImagePlugin
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError, features

from cm_jax.errors import InputError
from cm_jax.io.atomic import LFS_POINTER, LFS_REASON
from cm_jax.types import ImageSize, height_width

_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
"""Suffixes of each format. Files are recognized by content. Pillow's other readers are disabled: one of them starts
another program."""
if features.check("avif"):
    import PIL.AvifImagePlugin  # noqa: F401

    _FORMATS["AVIF"] = (".avif",)
SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
_MAX_PIXELS = 2**26
"""Larger images are refused before decoding and before resizing: a small file may claim any size."""


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels of an image file -> Pillow's mode."""


def decode(encoded: bytes, image_size: ImageSize, channels: int = 3) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """(center crop of `image_size`, whether the image was enlarged). Raises as `open_image`."""
    whole, (height, width) = with_channels(open_image(encoded), channels), height_width(image_size)
    pixels = np.asarray(center_crop(whole, image_size)).reshape(height, width, channels)
    return pixels, whole.width < width or whole.height < height


def open_image(encoded: bytes) -> Image.Image:
    """An image with its own kind of pixels: gray, palette, transparency, 8 or 16 bits.

    EXIF orientation is applied, and of an animation or a TIFF file with several pages the first image is read. Raises
    any exception, as Pillow does for damaged files.
    """
    if encoded.startswith(LFS_POINTER):
        raise ValueError(LFS_REASON)
    try:
        image = Image.open(io.BytesIO(encoded), formats=tuple(_FORMATS))
    except UnidentifiedImageError as error:
        raise ValueError(f"expected one of the formats {', '.join(_FORMATS)}") from error
    with image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {_MAX_PIXELS}")
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data are ignored
            ImageOps.exif_transpose(image, in_place=True)
        return image


def on_white(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, with transparency blended with white. Raises ValueError for more than 16 bits."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"expected pixels of 8 or 16 bits, got values from {gray.min()} to {gray.max()}")
        gray[gray == image.info.get("transparency", -1)] = 65535  # which Pillow's conversion ignores
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floating-point numbers")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in 8 bits: gray (1 channel) or RGB (3) on white, or RGBA (4). Raises as `on_white`."""
    if channels == 4 and image.has_transparency_data and not image.mode.startswith("I"):
        return image.convert("RGBA")
    return on_white(image).convert(MODES[channels])


def center_crop(image: Image.Image, image_size: ImageSize) -> Image.Image:
    """Downsample by 2 with BOX while both sides are at least twice `image_size`, resize with BICUBIC, and crop.

    Square images are pixel by pixel equal to the training data of the published models (openai/consistency_models,
    cm/image_datasets.py). Raises InputError for an image so long that it would be resized to more than _MAX_PIXELS.
    """
    height, width = height_width(image_size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = resize(image, scale)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, scale: float) -> Image.Image:
    """The image with `scale` times its width and height (BICUBIC). Raises InputError for more than _MAX_PIXELS."""
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MAX_PIXELS:
        raise InputError(
            f"Expected an image of at most {_MAX_PIXELS:,} pixels after resizing, got {image.width} x {image.height} "
            f"resized to {width} x {height}; crop its longer side."
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)
