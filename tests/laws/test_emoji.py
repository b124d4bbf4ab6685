"""The bundled emoji: how they were built, and their splits."""

import hashlib

import numpy as np
import pytest

from cm_jax.data import EmojiData
from cm_jax.data.npz import bundled_emoji
from cm_jax.errors import InputError
from tools import build_emoji32


def test_the_bundled_emoji_are_those_that_were_built():
    arrays = bundled_emoji()
    assert hashlib.sha256(arrays["images"].tobytes()).hexdigest() == (
        "d1ae8c1b3ec4bfa3523d6ad420b1ea9be3504fdcca8ff39e21615a53638d2388"
    )
    assert arrays["images"].shape == (3765, 32, 32, 3)
    assert np.bincount(arrays["labels"]).tolist() == [338, 741, 318, 262, 436, 170, 528, 448, 524]
    assert np.bincount(arrays["vendor"]).tolist() == [1892, 1873]
    assert len(arrays["class_names"]) == 9
    assert len(np.unique(arrays["images"].reshape(3765, -1), axis=0)) == 3765


def test_how_the_bundled_emoji_were_built(tmp_path):
    """Skin tones and images that are the same when halved are left out; the mean of four pixels, halves up."""
    images = np.zeros((4, 64, 64, 3), np.uint8)
    images[0, :2, :2, 0] = [[1, 2], [3, 4]]
    images[1, :2, :2, 0] = [[4, 3], [2, 1]]
    images[3, 0, 0, 1] = 1
    source = tmp_path / "emoji64.npz"
    arrays = {"labels": np.arange(4), "vendor": np.arange(4) % 2, "label_names": np.array(["a", "b", "c", "d"])}
    arrays |= {"is_base": np.array([True, True, False, True]), "unified": np.array(["1F600"] * 4)}
    np.savez(source, images=images, **arrays)
    built = build_emoji32.build(source)
    assert built["labels"].tolist() == [0, 3]
    assert built["images"][:, 0, 0].tolist() == [[3, 0, 0], [0, 0, 0]]
    assert not built["images"][:, 1:].any()


def test_no_emoji_is_in_both_splits():
    arrays = bundled_emoji()
    held_out = set(arrays["unified"][arrays["held_out"]])
    trained = set(arrays["unified"][~arrays["held_out"]])
    assert not held_out & trained
    assert 0.08 < len(held_out) / len(held_out | trained) < 0.13
    last_digit = {code: int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10 for code in held_out | trained}
    assert held_out == {code for code, digit in last_digit.items() if digit == 0}


def test_emoji_splits_open_at_their_sizes():
    train, held_out, every = (EmojiData(split).open(32) for split in ("train", "held_out", "all"))
    assert (train.size, held_out.size, every.size) == (3334, 431, 3765)
    assert set(held_out.labels) == set(range(9))
    rows = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in rows for image in held_out.images)
    assert train.class_names[8] == "Flags"
    small = EmojiData("held_out").open(16)
    assert small.images.shape == (431, 16, 16, 3)
    mean = held_out.images.reshape(431, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(small.images - mean).max() <= 1  # two roundings
    with pytest.raises(InputError, match="from 1 to 32, got 64"):
        EmojiData().open(64)
