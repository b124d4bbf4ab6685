"""Prepared TensorFlow Datasets in the array_record format, read without TensorFlow."""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm_jax.data.encoded import Encoded, EncodedData
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_path
from cm_jax.io.validation import read_json

_VERSION = r"(?:\d+|\*)\.(?:\d+|\*)\.(?:\d+|\*)"
"""A version of a data set, as TFDS writes it: 3.0.1 or 3.*.*."""


@dataclasses.dataclass(frozen=True)
class TFDSData(EncodedData):
    """A prepared data set of TensorFlow Datasets: cifar10, imagenet_resized/64x64, or your own. See docs/data.md."""

    name: str = "cifar10"
    """Name in the catalog, with its configuration if it has any, and optionally a version: mnist:3.0.1,
    imagenet_resized/64x64:0.1.0. Default: the newest prepared version."""
    split: str = "train"
    """Split: "train", "train[:90%]", "train+test"."""
    data_dir: str | None = None
    """Folder of all prepared data sets, or of this one (with dataset_info.json; `name` is then ignored). Default:
    $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    labels: str = "auto"
    """Feature with the classes. auto: the feature label, or the only one; none: without labels."""

    def encoded(self) -> Encoded:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise InputError("TFDS data sets need tensorflow-datasets: pip install tensorflow-datasets.") from error
        folder = self._folder()
        _check_features(folder)
        try:
            builder: Any = tfds.builder_from_directory(folder)
            info, features = builder.info, dict(builder.info.features.items())
        except Exception as error:  # TFDS and protobuf raise many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{folder} cannot be read as a data set of TensorFlow Datasets ({reason}). Its dataset_info.json or "
                "features.json is damaged or of another version: copy or prepare it again."
            ) from error
        image = _feature(features, tfds.features.Image, "image", folder)
        usable = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
        label = None if self.labels == "none" else self.labels
        if label == "auto":
            label = _feature(features, tfds.features.ClassLabel, "label", folder) if usable else None
        elif label is not None and label not in usable:
            raise InputError(f"{folder} has no class feature {label!r}; it has {', '.join(usable) or 'none'}.")
        try:
            source = builder.as_data_source(self.split, decoders={image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise InputError(
                f"{folder}: expected the format array_record, got {info.file_format.value}. Convert it, with "
                f"TensorFlow installed: tfds convert_format --dataset_version_dir={folder} "
                "--out_file_format=array_record --out_dir=ANOTHER_FOLDER"
            ) from error
        except (ValueError, KeyError) as error:
            splits = ", ".join(f"{name} ({split.num_examples})" for name, split in info.splits.items())
            raise InputError(f"{folder} has no split {self.split!r}; it has {splits}, and slices of them.") from error
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {str(error)[:200]}.") from error
        classes, names = None, ()
        if label and (features[label].num_classes or 0) >= 2:
            classes, names = features[label].num_classes, tuple(features[label].names or ())
        return _Records(f"{info.full_name}, {self.split}", classes, names, source, image, label)

    def _folder(self) -> Path:
        """The prepared folder. Raises InputError with instructions if there is none."""
        top = user_path(self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
        if (top / "dataset_info.json").is_file():
            return top
        if not re.fullmatch(rf"\w+(/[\w.+-]+)?(:{_VERSION})?", self.name):
            raise InputError(
                f"Expected a data set such as cifar10, name/configuration or mnist:3.0.1, got {self.name!r}."
            )
        name, _, version = self.name.partition(":")
        pattern = re.compile(re.escape(version).replace(r"\*", r"\d+"))  # 3.*.* is any version 3
        if prepared := {path.parent.name: path.parent for path in top.glob(f"{name}/*/dataset_info.json")}:
            versions = sorted(prepared, key=lambda each: [int(part) for part in each.split(".") if part.isdigit()])
            found = [each for each in versions if not version or pattern.fullmatch(each)]
            if not found:
                raise InputError(f"{name} in {top} has no version {version}; it has {', '.join(versions)}.")
            return prepared[found[-1]]
        if configured := sorted({path.parts[-3] for path in top.glob(f"{name}/*/*/dataset_info.json")}):
            names, first = ", ".join(configured), f"{name}/{configured[0]}"
            raise InputError(f"{name} in {top} has the configurations {names}: give one, such as {first}.")
        raise InputError(_how_to_prepare(self.name, top))


@dataclasses.dataclass(eq=False)
class _Records(Encoded):
    """Records with encoded images, and labels if there are classes."""

    source: Any
    image: str
    label: str | None

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return f"record {index}"

    def read(self, index: int) -> tuple[bytes, int]:
        record = self.source[index]
        return record[self.image], int(record[self.label]) if self.classes else 0


def _check_features(folder: Path) -> None:
    """Raise InputError if features.json names classes of other packages, because reading it would import them."""

    def classes(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(value[key]) for key in ("pythonClassName", "python_class_name", "type") if key in value)
            value = list(value.values())
        for part in value if isinstance(value, list) else ():
            yield from classes(part)

    for name in classes(read_json(folder / "features.json")):
        if "." in name and not name.startswith("tensorflow_datasets."):
            raise InputError(
                f"{folder / 'features.json'} names {name}, which is not part of TensorFlow Datasets and would be "
                "executed: prepare the data with features of TFDS only."
            )


def _feature(features: Any, kind: type, usual: str, folder: Path) -> str:
    """The feature of this type with the usual name, or the only one."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if usual in names or len(names) == 1:
        return usual if usual in names else names[0]
    found = f"several of this type: {', '.join(names)}" if names else ", ".join(features)
    raise InputError(f"{folder}: expected a feature {usual}, found {found}.")


def _how_to_prepare(name: str, top: Path) -> str:
    """The error message for a missing data set: unknown, or not prepared."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        tfds.builder(name, data_dir=str(top))
    except DatasetNotFoundError as error:
        known = re.findall(r"^\s*- (\w+)$", str(error), re.MULTILINE)
        prepared = [path.parent.parent.name for path in top.glob("*/*/dataset_info.json")]
        near = difflib.get_close_matches(re.split("[/:]", name)[0], [*prepared, *known], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return f"{name} is neither a TFDS data set nor a folder in {top}.{hint}"
    except (ImportError, AttributeError):
        pass  # its module needs TensorFlow
    except ValueError as error:
        return f"{name}: {str(error)[:500]}"
    folder = name.partition(":")[0].partition("/")[0]
    return (
        f"{name} is not prepared in {top}. Prepare it on a machine with network access (and TensorFlow, if required):\n"
        "  pip install tensorflow-datasets array-record\n"
        f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}')"
        ".download_and_prepare(file_format='array_record')\"\n"
        f"and copy ~/tensorflow_datasets/{folder} to {top}."
    )
