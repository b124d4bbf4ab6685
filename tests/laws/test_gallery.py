"""docs/gallery.md shows the images of tools/gallery.py, whose edited emoji are held out of training."""

import re

import numpy as np

from cm_jax.data.emoji import bundled
from tests.support import ROOT
from tools import gallery

PAGE = (ROOT / "docs" / "gallery.md").read_text("utf-8")


def numbers(codes):
    arrays = bundled()
    return [np.flatnonzero((arrays["unified"] == code) & (arrays["vendor"] == 0)).item() for code in codes]


def test_every_image_of_the_page_exists_and_is_small():
    shown = {ROOT / "docs" / path for path in re.findall(r"\]\((images/gallery_\w+\.png)\)", PAGE)}
    assert shown == set(gallery.IMAGES.glob("gallery_*.png"))
    assert len(shown) == 9
    assert all(path.stat().st_size < 300_000 for path in shown)


def test_the_emoji_were_held_out():
    codes = [*gallery.PICTURES.values(), *(code for pair in gallery.BETWEEN for code in pair)]
    assert bundled()["held_out"][numbers(codes)].all()


def test_pairs_have_the_same_class():
    for pair in gallery.BETWEEN:
        first, second = bundled()["labels"][numbers(pair)]
        assert first == second


def test_headings_are_above_their_columns():
    images = np.zeros((4, 16, 16, 3), np.float32)
    bare, headed = gallery.sheet(images, 2, ["a", "b"]), gallery.sheet(images, 2, ["a", "b"], ["left", "right"])
    assert bare.width == headed.width
    np.testing.assert_array_equal(np.asarray(headed)[headed.height - bare.height :], np.asarray(bare))
    above = np.asarray(headed.convert("L"))[: headed.height - bare.height]
    written = np.flatnonzero((above < 128).any(0))
    step = 16 * 6 + 2
    left, right = (
        written[(written >= edge) & (written < edge + step)] for edge in (bare.width - 2 * step, bare.width - step)
    )
    assert left.size
    assert right.size
