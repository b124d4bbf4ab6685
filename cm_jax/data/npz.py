"""Images in .npz files: the bundled emoji, and files given by the user."""

import dataclasses
import functools
import importlib.resources
import logging
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm_jax.data.base import Data, Dataset, InMemory, check_image_size, sorted_classes
from cm_jax.data.decoding import center_crop
from cm_jax.errors import InputError, nearest
from cm_jax.io.atomic import user_path
from cm_jax.io.npz import read_npz
from cm_jax.progress import activity
from cm_jax.types import ImageSize, height_width

log = logging.getLogger("cm_jax.data")

_SHOWN = 8
"""Class names in a message."""
_USUAL_CHANNELS = (1, 2, 3, 4, 6)
_USUAL_NAMES = {
    "images": ("images", "arr_0"),
    "labels": ("labels", "arr_1"),
    "class_names": ("class_names", "label_names"),
}


@dataclasses.dataclass(frozen=True)
class EmojiData(Data):
    """Bundled Noto and Twemoji images at 32 pixels, in 9 classes.

    The held-out split is selected by a hash of the code point, so it has the same emoji of both vendors.
    """

    split: Literal["train", "held_out", "all"] = "train"
    """train: 3,334 images; held_out: 431 images for evaluation; all: both."""

    def open(self, image_size: ImageSize = 32, *, channels: int | None = None) -> Dataset:
        check_image_size(image_size, most=32)
        if channels not in (None, 1, 3):
            raise InputError(f"The bundled emoji are RGB or gray images, got a network with {channels} channels.")
        arrays = bundled_emoji()
        held_out = arrays["held_out"]
        selected = {"train": ~held_out, "held_out": held_out, "all": slice(None)}[self.split]
        images = resized(arrays["images"][selected], image_size)
        if channels == 1:
            images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
        names, place = tuple(arrays["class_names"].tolist()), f"bundled emoji, {self.split.replace('_', ' ')}"
        return InMemory(images, arrays["labels"][selected], class_names=names, place=place)


@functools.cache
def bundled_emoji() -> dict[str, np.ndarray]:
    """Arrays of tools/build_emoji32.py: images uint8 [3765, 32, 32, 3]; per image labels, held_out, vendor (0 Google,
    1 Twitter) and unified (code points); class_names.
    """
    path = importlib.resources.files("cm_jax.assets").joinpath("emoji32.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@dataclasses.dataclass(frozen=True)
class NpzData(Data):
    """An .npz file with uint8 images [n, height, width, channels] and optional labels [n] or [n, 1].

    Labels are integers, with class names in class_names or label_names, or text: the class names themselves, in the
    order of class_names if present, else in alphabetical order, or in numerical order if all are numbers. Images of
    another size are resized and center-cropped, each channel on its own.
    """

    path: str
    """The file."""
    images: str = ""
    """Name of the array of images. Default: images or arr_0."""
    labels: str = ""
    """Name of the array of labels, or "none". Default: labels or arr_1, if present."""

    def open(self, image_size: ImageSize, *, channels: int | None = None) -> Dataset:
        check_image_size(image_size)
        images, labels, names = self._read(channels)
        return InMemory(resized(images, image_size), labels, class_names=names, place=self.path)

    def unchanged(self) -> InMemory:
        """The images without resizing; they need not be square."""
        images, labels, names = self._read()
        return InMemory(images, labels, class_names=names, place=self.path)

    def _read(self, channels: int | None = None) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
        """(images, labels if there are several, class names or none). Pickled arrays are refused."""
        try:
            with activity(f"Reading {self.path}"):
                found = read_npz(user_path(self.path), lambda names: self._names(names).values())
        except ValueError as error:
            raise InputError(f"{self.path} cannot be used as an .npz file of images: {error}.") from error
        used = self._names(list(found))
        labels, names = (found[used[use]] if use in used else None for use in ("labels", "class_names"))
        if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
            raise InputError(f"{self.path}: expected {used['class_names']} to be strings [n], got {_text(names)}.")
        if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
            log.info("%s: %s of shape %s are read as [n].", self.path, used["labels"], list(labels.shape))
            labels = labels[:, 0]
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iuU"):
            problem = f"expected {used['labels']} to be integers or strings [n], got {_text(labels)}"
            raise InputError(f"{self.path}: {problem}. If they are not labels, use labels: none.")
        if labels is not None and labels.dtype.kind == "U":
            labels, names = _numbered(self.path, labels, names)
        if labels is not None and len(np.unique(labels)) < 2:
            if self.labels:
                raise InputError(f"{self.path}: all labels are equal; train without them (labels: none).")
            labels = None
        images = _checked_images(self.path, found[used["images"]], channels)
        return images, labels, () if names is None else tuple(names.tolist())

    def _names(self, available: list[str]) -> dict[str, str]:
        """Use -> name of the array in the file. Raises ValueError if images or a requested array are missing."""
        requested = {"images": self.images, "labels": self.labels, "class_names": ""}
        if self.labels == "none":
            del requested["labels"]
        used = {}
        for use, name in requested.items():
            choices = (name,) if name else _USUAL_NAMES[use]
            present = [choice for choice in choices if choice in available]
            if present:
                used[use] = present[0]
            elif name or use == "images":
                raise ValueError(f"it has no {' or '.join(choices)}, but {', '.join(available) or 'nothing'}")
        return used


def _numbered(path: str, labels: np.ndarray, names: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(class numbers, class names) of labels that are class names.

    Without `names`, classes are sorted as in image folders. Raises InputError for a label that is not among `names`.
    """
    found = set(labels.tolist())
    classes = sorted_classes(found) if names is None else names.tolist()
    if unknown := sorted(found.difference(classes)):
        raise InputError(f"{path}: the label {unknown[0]!r} is not in class_names.{nearest(unknown[0], classes)}")
    if names is None:
        shown = ", ".join(classes[:_SHOWN]) + (", ..." if len(classes) > _SHOWN else "")
        log.info("%s: labels are text; %d classes in this order: %s.", path, len(classes), shown)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[label] for label in labels.tolist()]), np.array(classes)


def resized(images: UInt8[np.ndarray, "n h w c"], image_size: ImageSize) -> UInt8[np.ndarray, "n r s c"]:
    """Center crops of `image_size`; images of that size are returned unchanged."""
    size = height_width(image_size)
    if images.shape[1:3] == size:
        return images
    crops = np.empty((len(images), *size, images.shape[3]), np.uint8)
    with activity("Resizing", total=len(images)) as shown:
        for index, image in enumerate(images):
            for channel in range(images.shape[3]):
                crops[index, ..., channel] = np.asarray(center_crop(Image.fromarray(image[..., channel]), size))
            shown.advance()
    return crops


def _checked_images(path: str, images: np.ndarray, channels: int | None) -> np.ndarray:
    usual = _USUAL_CHANNELS if channels is None else (channels,)
    advice = ""
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        advice = " It has NaN or infinite pixels: sample the images again."
    elif images.dtype.kind == "f":
        advice = " Convert numbers in [-1, 1] by numpy.clip(numpy.round((x + 1) * 127.5), 0, 255).astype(numpy.uint8)."
    elif images.ndim == 4 and images.shape[1] in usual and images.shape[3] not in usual:
        advice = " Channels come last: numpy.transpose(x, (0, 2, 3, 1))."
    elif images.ndim == 3:
        advice = " Gray images have one channel: x[..., None]."
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in usual or not images.size:
        expected = f"images uint8 [n, height, width, {channels or 'channels'}]"
        raise InputError(f"{path}: expected {expected}, got {_text(images)}.{advice}")
    return images


def _text(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
