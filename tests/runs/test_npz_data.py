"""Images in .npz files: what is read, and what is refused."""

import numpy as np
import pytest

from cm_jax.data import NpzData
from cm_jax.errors import InputError

IMAGES = np.arange(4 * 8 * 8 * 3, dtype=np.uint32).reshape(4, 8, 8, 3).astype(np.uint8)
LABELS = np.array([0, 2, 1, 2])


def saved(path, **arrays):
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def test_arrays_by_their_usual_names(tmp_path):
    data = NpzData(saved(tmp_path, images=IMAGES, labels=LABELS, class_names=np.array(["x", "y", "z"]))).open(8)
    np.testing.assert_array_equal(data.images, IMAGES)
    assert data.labels.tolist() == LABELS.tolist()
    assert data.class_names == ("x", "y", "z")
    data = NpzData(saved(tmp_path, arr_0=IMAGES, arr_1=LABELS)).open(8)  # as save_npz and evaluators write them
    assert (data.classes, data.class_names) == (3, ())
    assert NpzData(saved(tmp_path, arr_0=IMAGES)).open(8).classes is None
    path = saved(tmp_path, x=IMAGES, y=LABELS)
    assert NpzData(path, images="x", labels="y").open(8).classes == 3
    assert NpzData(saved(tmp_path, images=IMAGES, labels=LABELS), labels="none").open(8).classes is None
    assert NpzData(saved(tmp_path, images=IMAGES, labels=np.zeros(4, int))).open(8).classes is None


def test_labels_of_shape_n_1_are_read_as_n(tmp_path, caplog):
    with caplog.at_level("INFO", "cm_jax"):
        data = NpzData(saved(tmp_path, images=IMAGES, labels=LABELS[:, None])).open(8)
    assert data.labels.tolist() == LABELS.tolist()
    assert "labels of shape [4, 1] are read as [n]" in caplog.text


def test_text_labels_are_class_names(tmp_path, caplog):
    def opened(labels, **arrays):
        data = NpzData(saved(tmp_path, images=IMAGES, labels=np.array(labels), **arrays)).open(8)
        return data.labels.tolist(), data.class_names

    with caplog.at_level("INFO", "cm_jax"):
        assert opened(["dog", "cat", "emu", "cat"]) == ([1, 0, 2, 0], ("cat", "dog", "emu"))
    assert "labels are text; 3 classes in this order: cat, dog, emu." in caplog.text
    assert opened([["10"], ["2"], ["2"], ["1"]]) == ([2, 1, 1, 0], ("1", "2", "10"))  # numbers, as in image folders
    ordered = np.array(["dog", "cat", "bee"])
    assert opened(["dog", "cat", "dog", "cat"], class_names=ordered) == ([0, 1, 0, 1], ("dog", "cat", "bee"))
    with pytest.raises(InputError, match=r"the label 'cats' is not in class_names. Did you mean 'cat'\?"):
        opened(["dog", "cats", "dog", "cats"], class_names=ordered)
    assert NpzData(saved(tmp_path, images=IMAGES, labels=np.array(["dog"] * 4))).open(8).classes is None


def test_arrays_of_another_size_are_center_cropped(tmp_path):
    data = NpzData(saved(tmp_path, images=IMAGES)).open(4)
    halves = IMAGES.reshape(4, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.abs(data.images - halves).max() <= 1
    gray = NpzData(saved(tmp_path, images=IMAGES[..., :1])).open(4)
    np.testing.assert_array_equal(gray.images[..., 0], data.images[..., 0])
    assert gray.image_shape == (4, 4, 1)


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({"pictures": IMAGES}, {}, "no images or arr_0, but pictures"),
        ({"images": IMAGES}, {"images": "x"}, "it has no x, but images"),
        ({"images": IMAGES}, {"labels": "x"}, "it has no x, but images"),
        ({"images": IMAGES / 127.5 - 1}, {}, r"expected images uint8.*got float64 \[4, 8, 8, 3\].*numpy.round"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, {}, r"\[4, 3, 8, 8\].*numpy.transpose"),
        ({"images": IMAGES[..., 0]}, {}, r"\[4, 8, 8\].*x\[..., None\]"),
        ({"images": IMAGES.astype(np.int32)}, {}, "int32"),
        ({"images": IMAGES[:0]}, {}, r"expected images uint8 .*got uint8 \[0, 8, 8, 3\]"),
        ({"images": np.array([object()])}, {}, "allow_pickle"),
        ({"images": IMAGES, "labels": LABELS[:3]}, {}, "3 labels for 4 images"),
        ({"images": IMAGES, "labels": LABELS - 1}, {}, "labels from -1 to 1"),
        ({"images": IMAGES, "labels": LABELS / 2}, {}, r"expected labels to be integers or strings.*got float64 \[4\]"),
        ({"images": IMAGES, "labels": np.eye(4, dtype=int)}, {}, r"expected labels to be .*got int64 \[4, 4\]"),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])}, {}, "labels from 0 to 2"),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.arange(3)},
            {},
            "expected class_names to be strings .*got int64",
        ),
        ({"images": IMAGES, "labels": np.ones(4, int)}, {"labels": "labels"}, "all labels are equal"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, settings, message):
    with pytest.raises(InputError, match=message):
        NpzData(saved(tmp_path, **arrays), **settings).open(8)


def test_files_that_are_no_npz(tmp_path):
    np.save(tmp_path / "one.npy", IMAGES)
    (tmp_path / "text.npz").write_text("no")
    whole = saved(tmp_path, images=IMAGES)
    with open(whole, "r+b") as file:
        file.seek(300)
        file.write(b"damage")
    for name, message in [
        ("one.npy", "it is not a complete .npz file"),
        ("text.npz", "it is not a complete .npz file"),
        ("data.npz", "CRC"),
        ("none.npz", "No such file"),
    ]:
        with pytest.raises(InputError, match=f"{name} cannot be used as an .npz file.*{message}"):
            NpzData(str(tmp_path / name)).open(8)
