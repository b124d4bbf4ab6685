"""A folder of image files."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from cm_jax.data.base import Dataset, Progress, check_image_size
from cm_jax.data.encoded import Encoded, EncodedData
from cm_jax.errors import InputError, indented_list
from cm_jax.io.atomic import user_path

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")

Relative = tuple[str, ...]
"""Path of a file relative to the top folder, in parts."""


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

    def open(self, image_size: int, progress: Progress | None = None) -> Dataset:
        check_image_size(image_size)
        files = image_files(user_path(self.path))
        names = _class_of_each(files, self.labels, self.path)
        return self.open_encoded(_Files(self.path, files, names), image_size, progress)


class _Files(Encoded):
    """Image files and their class names."""

    def __init__(self, place: str, files: list[Relative], names: list[str] | None) -> None:
        self.place = place
        self.class_names = tuple(sorted(set(names or ())))
        self.classes = len(self.class_names) or None
        self._files = files
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = [numbers[name] for name in names or ()]
        self._top = str(Path(place).expanduser().absolute())

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return _readable("/".join(self._files[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        content = Path(self._top, *self._files[index]).read_bytes()
        return content, self._labels[index] if self._labels else 0


def image_files(top: Path) -> list[Relative]:
    """All image files below `top`, sorted by path. Raises InputError if there are none."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}.") from error

    if not top.is_dir():
        found = "is a file" if top.exists() else "does not exist"
        raise InputError(f"Expected a folder of images; {top} {found}.")
    files: list[Relative] = []
    others: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # links may form a cycle
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        way = Path(folder).relative_to(top).parts
        for name in names:
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                files.append((*way, name))
            else:
                others.append(name)
    if not files:
        found = f"{len(others)} other files, such as {_readable(min(others))}" if others else "no files"
        raise InputError(f"Expected images ({', '.join(_SUFFIXES)}) in {top}, found {found}.")
    return sorted(files)


def _class_of_each(files: list[Relative], labels: str, place: str) -> list[str] | None:
    """Class name of every file; None without labels."""
    if labels == "none":
        return None
    if labels == "prefix":
        strays = [file for file in files if "_" not in file[-1]]
        names = [file[-1].split("_", 1)[0] for file in files]
        expected = 'a name such as "cat_0001.png" (labels: prefix)'
    else:
        strays = [file for file in files if len(file) == 1]
        names = [file[0] for file in files]
        expected = "a subfolder per class (labels: folder)"
    if labels == "auto" and (strays or len(set(names)) < 2):
        return None
    if strays:
        shown = indented_list([_readable("/".join(file)) for file in strays])
        raise InputError(f"{place}: {len(strays)} images have no class; expected {expected}.\n  {shown}")
    if len(set(names)) < 2:
        raise InputError(
            f"{place}: expected two classes or more, got one, {_readable(names[0])}. "
            "Train without labels (labels: none)."
        )
    return [_readable(name) for name in names]


def _readable(name: str) -> str:
    """A file name as valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
