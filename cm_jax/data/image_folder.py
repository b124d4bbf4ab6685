"""A folder of image files."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from cm_jax.data.encoded import Encoded, EncodedData
from cm_jax.errors import InputError, indented_list
from cm_jax.io.atomic import user_path

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class ImageFolder(EncodedData):
    """All jpg, jpeg, png, gif, webp and bmp files in a folder and its subfolders, center-cropped.

    Hidden files and folders are ignored.
    """

    path: str
    """The folder."""
    labels: Literal["auto", "none", "folder", "prefix"] = "auto"
    """Classes, in alphabetical order. folder: the first subfolder of each image. prefix: the file name up to the first
    "_", as in OpenAI's implementation. auto: folder if all images are in two or more subfolders, else none."""

    def encoded(self) -> Encoded:
        top = user_path(self.path)
        files = image_files(top)
        names = _class_of_each(files, self.labels, self.path)
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
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


def image_files(top: Path) -> list[tuple[str, ...]]:
    """All image files below `top`, as parts of their relative paths, sorted. Raises InputError if there are none."""

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
        images = [name for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
        files += [(*Path(folder).relative_to(top).parts, name) for name in images]
        others += set(names).difference(images)
    if not files:
        found = f"{len(others)} other files, such as {_readable(min(others))}" if others else "no files"
        raise InputError(f"Expected images ({', '.join(_SUFFIXES)}) in {top}, found {found}.")
    return sorted(files)


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
