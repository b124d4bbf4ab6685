"""Decoding and center-cropping of image files, as in OpenAI's implementation."""

import contextlib
import io

import numpy as np
import PIL.WebPImagePlugin  # noqa: F401  Pillow registers its reader too late
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Detected by content. Pillow's other readers are disabled: one of them starts another program."""
_MAX_PIXELS = 2**26
"""Larger images are refused before decoding: a small file may claim any size."""


def decode(encoded: bytes, image_size: int) -> tuple[UInt8[np.ndarray, "h w 3"], bool]:
    """(center crop of `image_size`, whether the image was enlarged). Raises as `read_image`."""
    whole = read_image(encoded)
    return np.asarray(center_crop(whole, image_size)), min(whole.size) < image_size


def read_image(encoded: bytes) -> Image.Image:
    """An 8-bit RGB image.

    EXIF orientation is applied, transparency is blended with white, 16 bits are reduced to 8, and of an animation the
    first frame is read. Raises any exception, as Pillow does for damaged files.
    """
    try:
        opened = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"expected one of the formats {', '.join(_FORMATS)}") from error
    with opened as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {_MAX_PIXELS}")
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data are ignored
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):
            gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Downsample by 2 with BOX while the shorter side is at least 2 `image_size`, resize with BICUBIC, and crop.

    Pixel by pixel equal to the training data of the published models (openai/consistency_models, cm/image_datasets.py).
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
