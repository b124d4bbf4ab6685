"""Image files: the format follows the name and the channels, and pixels are those of the images."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax.errors import InputError
from cm_jax.io.images import quantize


def some(channels=3, count=5):
    return np.random.default_rng(0).uniform(-1.1, 1.1, (count, 8, 6, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_grid_shows_every_image(channels):
    images = some(channels)
    sheet = cm_jax.image_grid(images, columns=3, rgba=channels == 4)
    assert sheet.mode == ("RGBA" if channels == 4 else "RGB")
    zoom, gap = 8, 2
    assert sheet.size == (3 * (6 * zoom + gap) + gap, 2 * (8 * zoom + gap) + gap)
    fifth = np.asarray(sheet)[gap + 8 * zoom + gap :, gap + 6 * zoom + gap :][: 8 * zoom : zoom, : 6 * zoom : zoom]
    np.testing.assert_array_equal(fifth, np.broadcast_to(quantize(images)[4], fifth.shape))
    assert sheet._repr_png_(), "notebooks show it"


def test_the_name_chooses_the_format(tmp_path):
    images = some()
    sheet = cm_jax.save_images(images, tmp_path / "a.png", columns=2)
    np.testing.assert_array_equal(Image.open(sheet), cm_jax.image_grid(images, columns=2))
    folder = cm_jax.save_images(jnp.asarray(images), str(tmp_path / "a"), labels=[0, 1, 2, 3, 14])
    files = sorted(folder.iterdir())
    assert files[4].name == "000004_class14.png"
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), quantize(images))
    archive = np.load(cm_jax.save_images(quantize(images), tmp_path / "a.npz", labels=range(5)))
    np.testing.assert_array_equal(archive["arr_0"], quantize(images))
    np.testing.assert_array_equal(archive["arr_1"], range(5))


def test_images_that_png_files_do_not_hold_become_an_archive(tmp_path):
    for channels, rgba, name, written in (
        (4, False, "a.png", "a.npz"),
        (4, False, "a", "a.npz"),
        (4, True, "b.png", "b.png"),
        (2, True, "c.png", "c.npz"),
    ):
        assert cm_jax.save_images(some(channels), tmp_path / name, rgba=rgba) == tmp_path / written
    latents = 7 * some(4)
    path = cm_jax.save_images(latents, tmp_path / "latents.png", quantization=None)
    np.testing.assert_array_equal(np.load(path)["arr_0"], latents)


@pytest.mark.usefixtures("unchecked_types")
def test_errors(tmp_path):
    for call, message in (
        (lambda: cm_jax.image_grid(some(4)), "got 4 channels: if they are RGBA, give rgba=True"),
        (lambda: cm_jax.image_grid(some(2)), "got 2 channels"),
        (lambda: cm_jax.image_grid(some()[0]), r"Expected images \[b, h, w, c\], got shape \[8, 6, 3\]"),
        (lambda: cm_jax.image_grid(some().astype(int)), "got int64; use images / 127.5 - 1"),
        (lambda: cm_jax.image_grid(some(), columns=0), "columns must be"),
        (lambda: cm_jax.save_images("cat", tmp_path / "a"), "images must be an array"),
        (lambda: cm_jax.save_images(some() + np.inf, tmp_path / "a.png"), "5 of 5 images have NaN or infinite pixels"),
        (lambda: cm_jax.save_images(some() * np.nan, tmp_path / "a.npz", quantization=None), "NaN or infinite"),
        (lambda: cm_jax.image_grid(some() * np.inf), "Use another checkpoint"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a.jpg"), "files are not supported"),
        (lambda: cm_jax.save_images(some(4), "."), "Expected a file or folder to write, got '.'"),
        (lambda: cm_jax.save_images(some(4), tmp_path / "new" / ".."), "Expected a file or folder to write"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a.npz", quantization="Round"), "Did you mean 'round'"),
        (lambda: cm_jax.save_images(quantize(some()), tmp_path / "a", quantization="floor"), "must be 'round', 'trunc"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a.png", columns=2, row_names=[1, 2, 3]), "list of 3 strings"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a.png", columns=2, row_names=list("abcd")), "of 3 strings"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a.png", columns=2, row_names="abc"), "of 3 strings"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a", labels=[1]), "Expected 5 class numbers"),
        (lambda: cm_jax.save_images(some(), tmp_path / "a", labels=[0.5] * 5), "Expected 5 class numbers"),
        (lambda: cm_jax.save_images(np.zeros((4097, 1, 1, 1), np.uint8), tmp_path / "a.png"), "at most 4096"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert not list(tmp_path.iterdir())
