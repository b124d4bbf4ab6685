"""TensorFlow Datasets: what is read, how it is labeled, and what is refused."""

import io
import itertools
import json
import sys

import numpy as np
import pytest
from PIL import Image

from cm_jax.data import TFDSData
from cm_jax.errors import InputError
from cm_jax.evaluation.image_sets import open_images
from tests.runs.test_image_folder import levels


def prepare(folder, extra=()):
    """A data set of 20 + 5 PNG files in the array_record format; image i has the gray level i and the class i % 2."""
    import tensorflow_datasets as tfds

    def png(level):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 12, 3), level, np.uint8)).save(file, "PNG")
        return io.BytesIO(file.getvalue())

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        code_path = None  # to find it TFDS would import a package that it does not require
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            labels = {name: tfds.features.ClassLabel(names=["even", "odd"]) for name in ("label", *extra)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"picture": tfds.features.Image(), **labels})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for index in range(count):
                yield index, {"picture": png(index), **dict.fromkeys(("label", *extra), index % 2)}

    Tiny(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


def test_a_prepared_data_set_by_name_and_by_folder(prepared, monkeypatch):
    data = TFDSData("tiny", data_dir=str(prepared)).open(8)
    assert sorted(levels(data)) == list(range(20))
    assert data.labels.tolist() == [level % 2 for level in levels(data)]
    assert data.class_names == ("even", "odd")
    assert data.description == "tiny/1.2.0, train: 20 images of 8 pixels, 2 classes, in memory (0 MB)"
    by_folder = TFDSData(data_dir=str(prepared / "tiny" / "1.2.0"), split="test").open(8)
    assert sorted(levels(by_folder)) == list(range(5))
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    part = TFDSData("tiny", split="train[:25%]", labels="none").open(8)
    assert (part.size, part.classes) == (5, None)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prepared_data_set_streamed(prepared, workers):
    data = TFDSData("tiny", data_dir=str(prepared)).open(8)
    streamed = TFDSData("tiny", data_dir=str(prepared), in_memory_gib=0, workers=workers).open(8)
    batches = streamed.batches(6)
    for ours, theirs in itertools.islice(zip(batches, data.batches(6), strict=False), 4):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    batches.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tiny", "split": "validation"}, r"no split 'validation'; it has train \(20\), test \(5\)"),
        ({"name": "tiny", "split": "train[:"}, "no split"),
        ({"name": "tiny", "labels": "kind"}, "no class feature 'kind'; it has label"),
        ({"name": "tinny"}, "Did you mean .*tiny"),
        ({"name": "cifa10"}, "Did you mean .*cifar10"),
        (
            {"name": "cifar10"},
            r"(?s)not prepared.*builder\('cifar10'\).download_and_prepare\(file_format='array_record",
        ),
        ({"name": "imagenet_resized/64x64"}, r"(?s)not prepared.*builder\('imagenet_resized/64x64'\)"),
        ({"name": "imagenet_resized/65x65"}, "65x65"),
        ({"name": "../tiny"}, "Expected a data set such as"),
    ],
)
def test_data_sets_that_are_not_there(prepared, settings, message):
    with pytest.raises(InputError, match=message):
        TFDSData(data_dir=str(prepared), **settings).open(8)


def test_several_kinds_of_labels_and_configurations(tmp_path):
    prepare(tmp_path, extra=("coarse",))
    assert TFDSData("tiny", data_dir=str(tmp_path), labels="coarse").open(8).classes == 2
    (tmp_path / "sized").mkdir()
    (tmp_path / "tiny").rename(tmp_path / "sized" / "8x8")
    with pytest.raises(InputError, match="configurations 8x8: give one, such as sized/8x8"):
        TFDSData("sized", data_dir=str(tmp_path)).open(8)


def test_the_newest_version_is_taken(tmp_path, prepared):
    for version in ("1.2.0", "1.10.0", "1.9.0"):
        (tmp_path / "tiny" / version).mkdir(parents=True)
        (tmp_path / "tiny" / version / "dataset_info.json").write_text("{}")
    assert TFDSData("tiny", data_dir=str(tmp_path))._folder().name == "1.10.0"


def test_a_name_may_have_a_version(prepared, tmp_path, monkeypatch):
    for version in ("1.2.0", "1.9.0", "2.0.0"):
        (tmp_path / "tiny" / version).mkdir(parents=True)
        (tmp_path / "tiny" / version / "dataset_info.json").write_text("{}")
    for asked, found in (("1.9.0", "1.9.0"), ("1.*.*", "1.9.0"), ("*.*.*", "2.0.0")):
        assert TFDSData(f"tiny:{asked}", data_dir=str(tmp_path))._folder().name == found
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert open_images("tfds:tiny:1.2.0:test", (8, 8, 3)).size == 5
    assert open_images("tfds:tiny:1.2.0", (8, 8, 3)).size == 20
    with pytest.raises(InputError, match=r"tiny in .* has no version 3.0.1; it has 1.2.0\."):
        TFDSData("tiny:3.0.1").open(8)
    with pytest.raises(InputError, match=r"mnist:3.0.1 is not prepared.*(?s:.*)copy ~/tensorflow_datasets/mnist to"):
        TFDSData("mnist:3.0.1").open(8)


@pytest.fixture
def copied(tmp_path, prepared):
    import shutil

    return shutil.copytree(prepared / "tiny" / "1.2.0", tmp_path / "copy")


def test_another_format_is_refused_with_the_command_that_converts_it(copied):
    info = json.loads((copied / "dataset_info.json").read_text())
    (copied / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(
        InputError, match=r"expected the format array_record, got tfrecord.*tfds convert_format --dataset_version_dir="
    ):
        TFDSData(data_dir=str(copied)).open(8)


def test_features_of_other_packages_are_not_imported(copied, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    features = (copied / "features.json").read_text()
    features = features.replace("tensorflow_datasets.core.features.class_label_feature.ClassLabel", "evil.Label")
    (copied / "features.json").write_text(features)
    with pytest.raises(InputError, match=r"names evil.Label"):
        TFDSData(data_dir=str(copied)).open(8)


def test_damaged_data_sets(copied):
    features = (copied / "features.json").read_text()
    (copied / "features.json").write_text("{")
    with pytest.raises(InputError, match=r"features.json cannot be read as JSON"):
        TFDSData(data_dir=str(copied)).open(8)
    (copied / "features.json").write_text(features.replace("class_label_feature.ClassLabel", "class_label_feature.No"))
    with pytest.raises(InputError, match=r"copy cannot be read as a data set of TensorFlow Datasets \("):
        TFDSData(data_dir=str(copied)).open(8)
    (copied / "features.json").write_text(features)
    info = (copied / "dataset_info.json").read_text()
    for damaged in (info[: len(info) // 2], "[]", "{}"):
        (copied / "dataset_info.json").write_text(damaged)
        with pytest.raises(InputError, match=r"copy cannot be read as a data set of TensorFlow Datasets \("):
            TFDSData(data_dir=str(copied)).open(8)
    (copied / "dataset_info.json").write_text(info)
    (copied / "tiny-train.array_record-00000-of-00001").unlink()
    with pytest.raises(InputError, match="no image can be read"):
        TFDSData(data_dir=str(copied)).open(8)
