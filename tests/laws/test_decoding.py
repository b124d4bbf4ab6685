"""Decoding of image files, and OpenAI's center crop."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from cm_jax.cli.edit import SuperResolve
from cm_jax.data import NpzData, center_crop, decode
from cm_jax.errors import InputError


def png(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def resampled(pixels, shape, kernel, reach):
    """Rows of weights times the pixels, along the width and then along the height, 8 bits after each."""
    for axis in (1, 0):
        count = pixels.shape[axis]
        ratio = count / shape[axis]
        width = max(ratio, 1)
        center = (np.arange(shape[axis])[:, None] + 0.5) * ratio
        taps = np.arange(count)
        inside = (taps >= np.floor(center - reach * width + 0.5)) & (taps < np.floor(center + reach * width + 0.5))
        weights = np.where(inside, kernel((taps - center + 0.5) * (1 / width)), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        product = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = np.clip(np.floor(product + 0.5), 0, 255)
    return pixels


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x):
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    return np.where(x < 1, inner, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))


@pytest.mark.parametrize("seed", range(12))
def test_centre_crop_is_halvings_a_bicubic_and_a_cut(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(6, 20))
    height, width = rng.integers(size // 2, 7 * size, 2)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    ours = np.asarray(center_crop(Image.fromarray(pixels), size))

    expected = pixels
    while min(expected.shape[:2]) >= 2 * size:
        expected = resampled(expected, (expected.shape[0] // 2, expected.shape[1] // 2), box, 0.5)
    height, width = expected.shape[:2]
    scale = size / min(height, width)
    expected = resampled(expected, (round(height * scale), round(width * scale)), bicubic, 2)
    top, left = (np.array(expected.shape[:2]) - size) // 2
    expected = expected[top : top + size, left : left + size]
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - expected).max() <= 2  # a tie rounded otherwise, magnified by the next filter


def test_centre_crop_leaves_a_square_of_its_size_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 9), pixels)
    wide = np.concatenate([np.zeros((9, 3, 3), np.uint8), pixels, np.zeros((9, 4, 3), np.uint8)], axis=1)
    np.testing.assert_array_equal(center_crop(Image.fromarray(wide), 9), pixels)  # floor of 3.5 columns cut at the left


def test_decoding_turns_an_image_as_its_exif_says():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    for orientation, corner in [(1, (0, 0)), (2, (0, 5)), (3, (3, 5)), (4, (3, 0))]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image, _ = decode(png(pixels, exif=exif), 4)
        full = np.zeros((4, 6))
        full[corner] = 255
        np.testing.assert_array_equal(image[..., 0], full[:, 1:5])
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = decode(png(pixels[:, :4], exif=exif), 4)
    assert image[0, 3, 0] == 255


def test_damaged_exif_does_not_make_a_bad_image():
    pixels = np.full((4, 4, 3), 7, np.uint8)
    image, _ = decode(png(pixels, exif=b"Exif\0\0nonsense"), 4)
    np.testing.assert_array_equal(image, pixels)


def test_decoding_puts_transparency_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 100, 0, 255)
    pixels[0, 1] = (200, 100, 0, 51)  # a fifth
    image, _ = decode(png(pixels), 2)
    np.testing.assert_array_equal(image[1], 255)
    np.testing.assert_array_equal(image[0, 0], (200, 100, 0))
    np.testing.assert_allclose(image[0, 1], (244, 224, 204), atol=1)
    palette = Image.fromarray(np.array([[0, 1], [1, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    image, _ = decode(file.getvalue(), 2)
    assert image.tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [255] * 3]]


def test_decoding_other_kinds_of_pixels():
    gray = np.array([[0, 1], [128, 255]], np.uint8)
    np.testing.assert_array_equal(decode(png(gray), 2)[0], np.repeat(gray[..., None], 3, axis=2))
    deep = gray.astype(np.uint16) * 257
    for offset in (0, 100, -100):  # nearest, of 257 numbers for each
        near = np.clip(deep.astype(int) + offset, 0, 65535).astype(np.uint16)
        np.testing.assert_array_equal(decode(png(near), 2)[0], np.repeat(gray[..., None], 3, axis=2))
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG", transparency=257)
    assert decode(file.getvalue(), 2)[0][..., 0].tolist() == [[0, 255], [128, 255]]
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    np.testing.assert_allclose(decode(file.getvalue(), 8)[0], np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_allclose(decode(file.getvalue(), 4)[0], np.broadcast_to([255, 0, 0], (4, 4, 3)), atol=3)


def test_decoding_tells_of_enlargement():
    pixels = np.zeros((4, 9, 3), np.uint8)
    assert [decode(png(pixels), size)[1] for size in (3, 4, 5)] == [False, False, True]
    assert decode(png(pixels), 5)[0].shape == (5, 5, 3)


def test_a_small_file_that_claims_many_pixels_is_refused():
    chunks = png(np.zeros((1, 1, 3), np.uint8))
    huge = chunks[:16] + (9000).to_bytes(4) + (9000).to_bytes(4) + chunks[24:]
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4) + huge[33:]
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        decode(huge, 8)


def test_a_long_image_whose_resized_size_would_exhaust_memory_is_refused(tmp_path):
    """Its 1 kB would become 64 x 19,200,000 pixels before the crop."""
    pixels = np.zeros((300_000, 1, 3), np.uint8)
    assert len(png(pixels)) < 2000
    with pytest.raises(ValueError, match=r"got 1 x 300000 resized to 64 x 19200000; crop its longer side"):
        decode(png(pixels), 64)
    np.savez_compressed(tmp_path / "x.npz", images=pixels[None])
    with pytest.raises(InputError, match="resized to 64 x 19200000"):
        NpzData(str(tmp_path / "x.npz")).open(64)
    with pytest.raises(InputError, match="resized to 64 x 19200000"):
        SuperResolve(pictures=()).canvas(Image.fromarray(pixels), (64, 64))


def test_only_image_formats_are_read_whatever_a_file_is_called():
    with pytest.raises(ValueError, match="expected one of the formats PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", 8)
    with pytest.raises(ValueError, match="Git LFS pointer, not the file itself; run `git lfs pull`"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", 8)


def test_pixels_of_more_than_16_bits_are_refused_with_their_values():
    for pixels, found in ((np.full((4, 4), 70000, np.int32), "from 70000"), (np.ones((4, 4), "f4"), "floating")):
        with pytest.raises(ValueError, match=f"expected pixels of 8 or 16 bits, got .*{found}"):
            decode(png(pixels, "TIFF"), 4)


def test_a_tiff_file_is_turned_once_and_gives_its_first_page_without_transparency():
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[0, 0] = (9, 99, 199, 255)
    exif = Image.Exif()
    exif[0x0112] = 3
    image, _ = decode(png(pixels, "TIFF", exif=exif, save_all=True, append_images=[Image.new("RGB", (2, 2))]), 4)
    np.testing.assert_array_equal(image, 255)
    image, _ = decode(png(pixels[:, :4], "TIFF", exif=exif), 4)
    np.testing.assert_array_equal(image[3, 3], (9, 99, 199))
