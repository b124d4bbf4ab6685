"""A folder of image files."""

import collections
import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Literal

from cm_jax.data.base import sorted_classes
from cm_jax.data.decoding import SUFFIXES
from cm_jax.data.encoded import Encoded, EncodedData
from cm_jax.errors import InputError, indented_list
from cm_jax.io.atomic import user_path

log = logging.getLogger("cm_jax.data")

_SPLIT = re.compile(r"(train|val|test|dev|eval|held)(ing|id|idation)?([-_ ]?out)?[-_ ]?[0-9]*", re.IGNORECASE)
"""Folders with the usual names of data splits: train, val, validation, test, train2017, held_out."""


@dataclasses.dataclass(frozen=True)
class ImageFolder(EncodedData):
    """All image files in a folder and its subfolders, center-cropped.

    Formats: PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, PGM, and AVIF if Pillow has it. Other files are counted in the log;
    hidden files and folders are ignored.
    """

    path: str
    """The folder."""
    labels: Literal["auto", "none", "folder", "prefix"] = "auto"
    """Classes, in alphabetical order, or in numerical order if all names are numbers. folder: the first subfolder of
    each image. prefix: the file name up to the first "_", as in OpenAI's implementation. auto: folder if all images are
    in two or more subfolders, else none."""

    def encoded(self) -> Encoded:
        top = user_path(self.path)
        files, others = image_files(top)
        if others:
            suffixes = collections.Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in others)
            counts = ", ".join(f"{_readable(suffix)}: {count}" for suffix, count in suffixes.most_common(8))
            plural = "s that are" if len(others) != 1 else " that is"
            log.warning(
                f"{self.path}: left out {len(others):,} file{plural} not of a known image format ({counts}), such as "
                f"{_readable(min(others))}."
            )
        if self.labels != "none":
            _check_splits(files, self.path)
        names = _class_of_each(files, self.labels, self.path)
        numbers = {name: number for number, name in enumerate(sorted_classes(set(names)))}
        labels = [numbers[name] for name in names]
        return _Files(self.path, len(numbers) or None, tuple(numbers), top.absolute(), files, labels)


@dataclasses.dataclass(eq=False)
class _Files(Encoded):
    """Image files below `top` and their classes."""

    top: Path
    files: list[tuple[str, ...]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return _readable("/".join(self.files[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        return self.top.joinpath(*self.files[index]).read_bytes(), self.labels[index] if self.labels else 0


def image_files(top: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """All image files below `top`, as parts of their relative paths, sorted; and the names of other files.

    Raises InputError if there are no images.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}.") from error

    if not top.is_dir():
        found = "is a file" if top.exists() else "does not exist"
        raise InputError(f"Expected a folder of images; {top} {found}.")
    files: list[tuple[str, ...]] = []
    others: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # links may form a cycle
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        shown = [name for name in names if not name.startswith(".")]
        images = [name for name in shown if name.lower().endswith(SUFFIXES)]
        files += [(*Path(folder).relative_to(top).parts, name) for name in images]
        others += set(shown).difference(images)
    if not files:
        found = f"{len(others)} other files, such as {_readable(min(others))}" if others else "no files"
        raise InputError(f"Expected images ({', '.join(SUFFIXES)}) in {top}, found {found}.")
    return sorted(files), others


def _check_splits(files: list[tuple[str, ...]], place: str) -> None:
    """Raise InputError if the subfolders are data splits, whose names are not classes."""
    above = os.path.commonprefix([file[:-1] for file in files])  # noqa: RUF071  of tuples
    folders = sorted({file[len(above)] for file in files if len(file) > len(above) + 1})
    splits = {name: match[1].lower() for name in folders if (match := _SPLIT.fullmatch(name))}
    if len(set(splits.values())) > 1:
        preferred = min(splits, key=lambda name: splits[name] != "train")
        found, chosen = f"the data splits {' and '.join(splits)}", (*above, preferred)
    elif len(folders) > 1 and above and _SPLIT.fullmatch(above[-1]):
        found, chosen = f"the data split {above[-1]}", above
    else:
        return
    raise InputError(
        f"{place}: expected classes as subfolders, got {found}. Give one split: --data.path "
        f"{_readable('/'.join((place.rstrip('/'), *chosen)))}; or all images without classes: labels: none."
    )


def _class_of_each(files: list[tuple[str, ...]], labels: str, place: str) -> list[str]:
    """Class name of every file; empty without labels."""
    if labels == "none":
        return []
    if labels == "prefix":
        strays = [file for file in files if "_" not in file[-1]]
        names = [file[-1].split("_", 1)[0] for file in files]
        expected = 'a name such as "cat_0001.png" (labels: prefix)'
    else:
        strays = [file for file in files if len(file) == 1]
        names = [file[0] for file in files]
        expected = "a subfolder per class (labels: folder)"
    one_class = len(set(names)) < 2
    if labels == "auto" and (strays or one_class):
        return []
    if strays:
        shown = indented_list([_readable("/".join(file)) for file in strays])
        raise InputError(f"{place}: {len(strays)} images have no class; expected {expected}.\n  {shown}")
    if one_class:
        found = f"expected two classes or more, got one, {_readable(names[0])}"
        raise InputError(f"{place}: {found}. Train without labels (labels: none).")
    return [_readable(name) for name in names]


def _readable(name: str) -> str:
    """A file name as valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
