"""Image folders: what is read, how it is labeled, streaming, and unreadable files."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.features
import pytest
from PIL import Image

from cm_jax.data import ImageFolder, InMemory, Streamed, TFDSData
from cm_jax.errors import InputError
from tests.support import ROOT


def write(path, level, shape=(8, 8), **options):
    """An image file all of one gray level, 0 ... 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), level, np.uint8)).save(path, **options)


def levels(data):
    return data.images[:, 0, 0, 0].tolist()


@pytest.fixture
def folder(tmp_path):
    """b/0 ... b/4 and a/5 ... a/9, each image of the gray level 10 times its number."""
    for index in range(10):
        write(tmp_path / "images" / ("b" if index < 5 else "a") / f"{index}.png", 10 * index)
    return tmp_path / "images"


# Folders


def test_a_folder_is_read_in_the_order_of_its_names_with_its_classes(folder):
    data = ImageFolder(str(folder)).open(8)
    assert isinstance(data, InMemory)
    assert levels(data) == [50, 60, 70, 80, 90, 0, 10, 20, 30, 40]
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert data.class_names == ("a", "b")
    assert data.description == f"{folder}: 10 images of 8 pixels, 2 classes, in memory (0 MB)"


def test_class_folders_named_by_numbers_are_in_numerical_order(tmp_path):
    for number in range(12):
        write(tmp_path / str(number) / "a.png", 10 * number)
    data = ImageFolder(str(tmp_path)).open(8)
    assert data.class_names == tuple(map(str, range(12)))
    assert dict(zip(data.labels.tolist(), levels(data), strict=True)) == {number: 10 * number for number in range(12)}
    write(tmp_path / "x" / "a.png", 0)
    assert ImageFolder(str(tmp_path)).open(8).class_names == ("0", "1", "10", "11", *"23456789x")


def test_streamed_images_are_renumbered_as_in_memory(folder):
    memory, streamed = (
        ImageFolder(str(folder), in_memory_gib=gib).open(8).renumbered(np.array([1, 0], np.int32), ("b", "a"), "back")
        for gib in (1, 0)
    )
    one, two = (next(data.batches(10)) for data in (memory, streamed))
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_array_equal(one.labels, one.images[:, 0, 0, 0] // 50)


def test_every_kind_of_image_file_is_read_whatever_its_letters(tmp_path):
    names = ["a.PNG", "b.jpg", "c.JPeG", "d.gif", "e.webp", "f.bmp", "g.jfif", "h.TIF", "i.tiff", "j.ppm", "k.pgm"]
    names += ["l.avif"] if PIL.features.check("avif") else []
    for index, name in enumerate(names):
        write(tmp_path / name, 20 * index)
    write(tmp_path / "z" / "er" / "g.png", 250)
    write(tmp_path / ".hidden" / "h.png", 1)
    write(tmp_path / "._a.png", 1)
    data = ImageFolder(str(tmp_path)).open(8)
    np.testing.assert_allclose(levels(data), [*range(0, 20 * len(names), 20), 250], atol=1)
    assert data.classes is None


def test_files_of_other_formats_are_counted_by_suffix_and_named(tmp_path, caplog):
    write(tmp_path / "a.png", 1)
    for name in ("b.HEIC", "c/d.heic", "e.txt", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert ImageFolder(str(tmp_path)).open(8).size == 1
    assert "left out 3 files that are not of a known image format (.heic: 2, .txt: 1), such as b.HEIC." in caplog.text


@pytest.mark.parametrize(
    ("files", "found", "advice"),
    [
        (["train/cat/1", "val/cat/1", "train/dog/1"], "splits train and val", "/train;"),
        (["train2017/1", "val2017/1", "test2017/1"], "splits test2017 and train2017 and val2017", "/train2017;"),
        (["Training/a/1", "Testing/a/1", "logo"], "splits Testing and Training", "/Training;"),
        (["in/validation/a/1", "in/test/b/1", "in/rest/b/1"], "splits test and validation", "/in/test;"),
        (["train/cat/1", "train/dog/1"], "the data split train", "/train;"),
    ],
)
def test_data_splits_are_not_classes(tmp_path, files, found, advice):
    for name in files:
        write(tmp_path / f"{name}.png", 0)
    for labels in ("auto", "folder", "prefix"):
        with pytest.raises(InputError, match=f"{found}. Give one split: --data.path {tmp_path}{advice}"):
            ImageFolder(f"{tmp_path}/", labels=labels).open(8)
    assert ImageFolder(str(tmp_path), labels="none").open(8).size == len(files)


def test_classes_with_the_name_of_a_split_are_classes(tmp_path):
    for name in ("bus", "train", "car"):
        write(tmp_path / name / "1.png", 0)
    assert ImageFolder(str(tmp_path)).open(8).class_names == ("bus", "car", "train")


def test_links_in_a_circle_end(folder):
    (folder / "a" / "up").symlink_to(folder)
    assert ImageFolder(str(folder)).open(8).size == 10


def test_classes_from_prefixes_as_the_original_numbers_them(tmp_path):
    for index, name in enumerate(["x/n02_1.png", "n01_b_7.png", "x/n02_0.png", "n03_1.png"]):
        write(tmp_path / name, index)
    data = ImageFolder(str(tmp_path), labels="prefix").open(8)
    assert data.class_names == ("n01", "n02", "n03")
    assert dict(zip(levels(data), data.labels.tolist(), strict=True)) == {0: 1, 1: 0, 2: 1, 3: 2}


def test_automatic_labels_are_sub_folders_or_nothing(tmp_path, folder):
    write(tmp_path / "flat" / "cat_1.png", 1)
    write(tmp_path / "flat" / "dog_1.png", 1)
    write(tmp_path / "single" / "a" / "1.png", 1)
    write(tmp_path / "mixed" / "a" / "1.png", 1)
    write(tmp_path / "mixed" / "b" / "1.png", 1)
    write(tmp_path / "mixed" / "1.png", 1)
    assert [ImageFolder(str(tmp_path / name)).open(8).classes for name in ("flat", "single", "mixed")] == [None] * 3
    assert ImageFolder(str(folder), labels="none").open(8).classes is None


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_in_memory(folder, workers):
    data = ImageFolder(str(folder)).open(8)
    streamed = ImageFolder(str(folder), in_memory_gib=0, workers=workers).open(8)
    assert isinstance(streamed, Streamed)
    assert (streamed.size, streamed.classes, streamed.class_names) == (data.size, data.classes, data.class_names)
    batches = streamed.batches(6, seed=9, start=2, host=1, hosts=2)
    for ours, theirs in itertools.islice(zip(batches, data.batches(6, 9, 2, 1, 2), strict=False), 7):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    batches.close()


STREAMING = """
import itertools, multiprocessing, sys
from cm_jax.data import ImageFolder
def main():
    batches = ImageFolder(sys.argv[1], in_memory_gib=0, workers=1).open(8).batches(10)
    print([sorted(b.images[:, 0, 0, 0].tolist()) for b in itertools.islice(batches, 2)])
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    for _ in itertools.islice(batches, 20):  # more than are buffered
        pass
    batches.close()
if __name__ == "__main__":
    main()
"""


def start_streaming(folder):
    """A process of its own that streams by a worker process, without absl's flags, as train.py does."""
    path = folder.parent / "script.py"
    path.write_text(STREAMING)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(path), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def test_worker_processes_name_unreadable_files_ignore_signals_and_end_without_a_complaint(folder):
    """Ctrl-C and many launchers send a signal to all processes of a run."""
    (folder / "a" / "5.png").write_bytes(b"nonsense")
    with start_streaming(folder) as process:
        images, worker = process.stdout.readline().strip(), int(process.stdout.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        _, complaints = process.communicate("\n", timeout=600)
    assert process.returncode == 0, complaints
    assert images == str([[0, 10, 20, 30, 40, 60, 60, 70, 80, 90]] * 2)
    assert len(complaints.splitlines()) == 1
    assert "Replaced an unreadable image: a/5.png: expected one of the formats" in complaints


def test_worker_processes_end_when_the_run_is_killed(folder):
    with start_streaming(folder) as process:
        process.stdout.readline()
        workers = [int(number) for number in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 1
    for _ in range(6000):  # ten minutes, for busy machines
        if not any(is_running(worker) for worker in workers):
            return
        time.sleep(0.1)
    pytest.fail(f"{workers} still run")


def is_running(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_small_images_are_enlarged_and_that_is_said_once(folder, caplog):
    data = ImageFolder(str(folder)).open(12)
    assert levels(data)[:2] == [50, 60]
    assert [record.getMessage() for record in caplog.records] == [
        f"Images smaller than 12 pixels were enlarged. {folder}: 10 of 10."
    ]
    caplog.clear()
    batches = ImageFolder(str(folder), in_memory_gib=0).open(12).batches(4)
    for _ in range(3):
        next(batches)
    batches.close()
    assert len(caplog.records) == 1


# Files that cannot be read


@pytest.fixture
def damaged(folder):
    """The folder with a truncated file, an empty one and a text among its images."""
    whole = (folder / "a" / "6.png").read_bytes()
    (folder / "a" / "6.png").write_bytes(whole[:-30])
    (folder / "b" / "1.png").write_bytes(b"")
    (folder / "b" / "2.png").write_text("an image")
    return folder


def test_unreadable_files_are_named_and_replaced_in_memory_as_in_streams(damaged, caplog):
    data = ImageFolder(str(damaged), max_corrupt=3).open(8)
    assert levels(data) == [50, 70, 70, 80, 90, 0, 30, 30, 30, 40]
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    named = [re.search(r"image: (\S+):", record.getMessage())[1] for record in caplog.records]
    assert named == ["a/6.png", "b/1.png", "b/2.png"]
    (damaged / "b" / "4.png").write_bytes(b"")  # the last one, which the first replaces
    in_memory, streamed = (ImageFolder(str(damaged), in_memory_gib=gib).open(8).batches(10) for gib in (1, 0))
    for one, other in zip(next(in_memory), next(streamed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_more_unreadable_files_than_allowed_are_an_error(damaged):
    with pytest.raises(
        InputError, match=r"(?s)3 images cannot be read, more than max_corrupt = 2.*\n  a/6.png:.*\n  b/1.png:"
    ):
        ImageFolder(str(damaged), max_corrupt=2).open(8)
    batches = ImageFolder(str(damaged), max_corrupt=2, in_memory_gib=0).open(8).batches(10)
    with pytest.raises(InputError, match="3 images cannot be read, more than max_corrupt = 2"):
        next(batches)


def test_the_order_does_not_depend_on_the_threads(tmp_path, monkeypatch):
    for index in range(200):
        write(tmp_path / f"{index:03}.png", index)
    (tmp_path / "077.png").write_bytes(b"")
    monkeypatch.setattr("cm_jax.data.encoded._CHUNK", 3)
    monkeypatch.setattr("cm_jax.data.encoded.THREADS", 8)
    expected = [78 if index == 77 else index for index in range(200)]
    assert all(levels(ImageFolder(str(tmp_path)).open(8)) == expected for _ in range(3))


def an_empty_folder(path):
    path.mkdir()


def a_file(path):
    write(path.with_suffix(".png"), 0)
    path.with_suffix(".png").rename(path)


def no_images(path):
    path.mkdir()
    (path / "b.txt").write_text("")
    (path / "a.csv").write_text("")


def all_corrupt(path):
    path.mkdir()
    (path / "a.png").write_text("")
    (path / "b.png").write_text("")


def one_class(path):
    write(path / "a" / "x_1.png", 0)
    write(path / "a" / "x_2.png", 0)


def strays(path):
    write(path / "a" / "x_1.png", 0)
    write(path / "2.png", 0)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda path: None, {}, "Expected a folder of images; .* does not exist"),
        (an_empty_folder, {}, "found no files"),
        (a_file, {}, "Expected a folder of images; .* is a file"),
        (no_images, {}, "2 other files, such as a.csv"),
        (all_corrupt, {}, r"(?s)no image can be read.*a.png.*b.png"),
        (all_corrupt, {"max_corrupt": 1}, "2 images cannot be read, more than max_corrupt = 1"),
        (one_class, {"labels": "folder"}, "expected two classes or more, got one, a.*labels: none"),
        (one_class, {"labels": "prefix"}, "expected two classes or more, got one, x"),
        (strays, {"labels": "folder"}, r"(?s)1 images have no class.*subfolder per class.*\n  2.png"),
        (strays, {"labels": "prefix"}, r"(?s)1 images have no class.*cat_0001.png.*\n  2.png"),
        (one_class, {"workers": -1}, "Expected in_memory_gib >= 0"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, settings, message):
    make(tmp_path / "images")
    with pytest.raises(InputError, match=message):
        ImageFolder(str(tmp_path / "images"), **settings).open(8)


@pytest.mark.parametrize("size", [0, -8, 5000])
def test_image_sizes_that_are_none(folder, size):
    with pytest.raises(InputError, match=f"image size .* from 1 to 4096, got {size}"):
        ImageFolder(str(folder)).open(size)


def test_missing_packages_are_reported(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"streaming needs grain: pip install grain"):
        ImageFolder(str(folder), in_memory_gib=0).open(8)
    with pytest.raises(InputError, match=r"pip install tensorflow-datasets"):
        TFDSData().open(8)
    assert ImageFolder(str(folder)).open(8).size == 10
