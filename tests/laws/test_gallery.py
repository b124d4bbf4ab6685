"""docs/gallery.md shows exactly the images of tools/gallery.py; the edited emoji are held out of training."""

import re

import numpy as np

from cm_jax.data.npz import bundled_emoji
from tests.support import ROOT
from tools import gallery

PAGE = (ROOT / "docs" / "gallery.md").read_text("utf-8")


def indices(codes):
    """Indices of emoji in the bundled data set."""
    arrays = bundled_emoji()
    return [np.flatnonzero((arrays["unified"] == code) & (arrays["vendor"] == 0)).item() for code in codes]


def test_the_page_shows_every_gallery_image_and_all_are_small():
    shown = {ROOT / "docs" / path for path in re.findall(r"\]\((images/gallery_\w+\.png)\)", PAGE)}
    assert shown == set(gallery.IMAGES.glob("gallery_*.png"))
    assert len(shown) == 10
    assert all(path.stat().st_size < 300_000 for path in shown)


def test_edited_emoji_are_held_out_of_training():
    codes = [*gallery.PICTURES.values(), *(code for pair in gallery.BETWEEN for code in pair)]
    assert bundled_emoji()["held_out"][indices(codes)].all()


def test_interpolated_pairs_have_the_same_class():
    for pair in gallery.BETWEEN:
        first, second = bundled_emoji()["labels"][indices(pair)]
        assert first == second


def test_column_headings_are_above_their_columns():
    images = np.zeros((4, 16, 16, 3), np.float32)
    plain, headed = gallery.sheet(images, 2, ["a", "b"]), gallery.sheet(images, 2, ["a", "b"], ["left", "right"])
    assert plain.width == headed.width
    np.testing.assert_array_equal(np.asarray(headed)[headed.height - plain.height :], np.asarray(plain))
    above = np.asarray(headed.convert("L"))[: headed.height - plain.height]
    dark_columns = np.flatnonzero((above < 128).any(0))
    step = 16 * 6 + 2
    left, right = (
        dark_columns[(dark_columns >= edge) & (dark_columns < edge + step)]
        for edge in (plain.width - 2 * step, plain.width - step)
    )
    assert left.size
    assert right.size
