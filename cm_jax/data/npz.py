"""Arrays in a numpy file."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm_jax.data.base import Data, Dataset, Progress, checked_image_size
from cm_jax.data.decoding import centre_crop
from cm_jax.data.in_memory import InMemory
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_path
from cm_jax.io.npz import read_npz

_IMAGES = ("images", "arr_0")
_LABELS = ("labels", "arr_1")
_NAMES = ("class_names", "label_names")


@dataclasses.dataclass(frozen=True)
class NpzData(Data):
    """An .npz file: uint8 images [n, height, width, 3] (or 1 for grey), and whole-numbered labels [n] if it has any.

    Names of the classes are read from class_names or label_names. Images of another size are centre-cropped.
    """

    path: str
    """The file."""
    images: str = ""
    """Name of the images in it. Default: images, or arr_0."""
    labels: str = ""
    """Name of the labels in it, or "none". Default: labels, or arr_1, where it has them."""

    def open(self, image_size: int, progress: Progress | None = None) -> Dataset:
        checked_image_size(image_size)
        return self._opened(lambda images: resized(images, image_size, progress))

    def unchanged(self) -> InMemory:
        """The images in the size that they have, square or not."""
        return self._opened(lambda images: images)

    def _opened(self, prepared: Callable[[np.ndarray], np.ndarray]) -> InMemory:
        arrays = self._read()
        labels, names = arrays.get("labels"), tuple(map(str, arrays.get("names", ())))
        if labels is not None and len(np.unique(labels)) < 2:
            if self.labels:
                raise InputError(f"{self.path}: all labels are the same; train without them (labels: none).")
            labels = None
        images = prepared(_checked_images(self.path, arrays["images"]))
        return InMemory(images, labels, class_names=() if labels is None else names, place=self.path)

    def _read(self) -> dict[str, np.ndarray]:
        """images, and labels and names where there are any. Nothing in the file can run code."""
        try:
            found = read_npz(user_path(self.path), lambda names: self._wanted(names).values())
        except ValueError as error:
            raise InputError(f"{self.path} cannot be used as an .npz file of images: {error}.") from error
        wanted = self._wanted(list(found))
        arrays = {use: found[name] for use, name in wanted.items()}
        labels, names = arrays.get("labels"), arrays.get("names")
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            raise InputError(
                f"{self.path}: {wanted['labels']} is {_shown(labels)}; wanted: whole numbers [n]. "
                "If they are no labels, go without (labels: none)."
            )
        if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
            raise InputError(f"{self.path}: {wanted['names']} is {_shown(names)}; wanted: a list of texts.")
        return arrays

    def _wanted(self, names: list[str]) -> dict[str, str]:
        """Which of the arrays in the file is what. Raises ValueError where there are no images."""
        images = _chosen(names, self.images, _IMAGES)
        if images is None:
            raise ValueError(f"it has no {' or '.join(_IMAGES)}, but {', '.join(names) or 'nothing'}")
        labels = None if self.labels == "none" else _chosen(names, self.labels, _LABELS)
        found = {"images": images, "labels": labels, "names": next((name for name in _NAMES if name in names), None)}
        return {use: name for use, name in found.items() if name is not None}


def resized(
    images: UInt8[np.ndarray, "n h w c"], image_size: int, progress: Progress | None = None
) -> UInt8[np.ndarray, "n r r c"]:
    """Centre crops of `image_size`; the images themselves where that is what they are."""
    if images.shape[1:3] == (image_size, image_size):
        return images
    crops = np.empty((len(images), image_size, image_size, images.shape[3]), np.uint8)
    for index, image in enumerate(images):
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        crops[index] = np.asarray(centre_crop(picture, image_size)).reshape(crops.shape[1:])
        if progress is not None and (index + 1) % 256 == 0:
            progress(index + 1, len(images))
    return crops


def _chosen(names: list[str], asked: str, usual: tuple[str, ...]) -> str | None:
    """The array that is meant. Raises ValueError where the one asked for is not there."""
    if asked and asked not in names:
        raise ValueError(f"it has no {asked}, but {', '.join(names) or 'nothing'}")
    return asked or next((name for name in usual if name in names), None)


def _checked_images(path: str, images: np.ndarray) -> np.ndarray:
    advice = ""
    if images.dtype.kind == "f":
        advice = " Write numbers in [-1, 1] as numpy.clip(numpy.round((x + 1) * 127.5), 0, 255).astype(numpy.uint8)."
    elif images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        advice = " Channels come last: numpy.transpose(x, (0, 2, 3, 1))."
    elif images.ndim == 3:
        advice = " Grey images have one channel: x[..., None]."
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        wanted = "uint8 [n, height, width, 3]"
        raise InputError(f"{path}: the images are {_shown(images)}; wanted: {wanted}.{advice}")
    return images


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
