"""Images in .npz files."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm_jax.data.base import Data, Dataset, InMemory, Progress, check_image_size
from cm_jax.data.decoding import center_crop
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_path
from cm_jax.io.npz import read_npz

_IMAGES = ("images", "arr_0")
_LABELS = ("labels", "arr_1")
_NAMES = ("class_names", "label_names")


@dataclasses.dataclass(frozen=True)
class NpzData(Data):
    """An .npz file with uint8 images [n, height, width, channels], 3 channels or 1, and optional integer labels [n].

    Class names are read from class_names or label_names. Images of another size are center-cropped.
    """

    path: str
    """The file."""
    images: str = ""
    """Name of the array of images. Default: images or arr_0."""
    labels: str = ""
    """Name of the array of labels, or "none". Default: labels or arr_1, if present."""

    def open(self, image_size: int, progress: Progress | None = None) -> Dataset:
        check_image_size(image_size)
        return self._opened(lambda images: resized(images, image_size, progress))

    def unchanged(self) -> InMemory:
        """The images without resizing; they need not be square."""
        return self._opened(lambda images: images)

    def _opened(self, prepared: Callable[[np.ndarray], np.ndarray]) -> InMemory:
        arrays = self._read()
        labels, names = arrays.get("labels"), tuple(map(str, arrays.get("names", ())))
        if labels is not None and len(np.unique(labels)) < 2:
            if self.labels:
                raise InputError(f"{self.path}: all labels are equal; train without them (labels: none).")
            labels = None
        images = prepared(_checked_images(self.path, arrays["images"]))
        return InMemory(images, labels, class_names=() if labels is None else names, place=self.path)

    def _read(self) -> dict[str, np.ndarray]:
        """images, labels and names, as far as present. Pickled arrays are refused."""
        try:
            found = read_npz(user_path(self.path), lambda names: self._names(names).values())
        except ValueError as error:
            raise InputError(f"{self.path} cannot be used as an .npz file of images: {error}.") from error
        arrays_by_use = self._names(list(found))
        arrays = {use: found[name] for use, name in arrays_by_use.items()}
        labels, names = arrays.get("labels"), arrays.get("names")
        if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
            raise InputError(
                f"{self.path}: expected {arrays_by_use['labels']} to be integers [n], got {_text(labels)}. "
                "If they are not labels, use labels: none."
            )
        if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
            raise InputError(f"{self.path}: expected {arrays_by_use['names']} to be strings [n], got {_text(names)}.")
        return arrays

    def _names(self, names: list[str]) -> dict[str, str]:
        """Use -> name of the array in the file. Raises ValueError without images."""
        images = _select(names, self.images, _IMAGES)
        if images is None:
            raise ValueError(f"it has no {' or '.join(_IMAGES)}, but {', '.join(names) or 'nothing'}")
        labels = None if self.labels == "none" else _select(names, self.labels, _LABELS)
        found = {"images": images, "labels": labels, "names": next((name for name in _NAMES if name in names), None)}
        return {use: name for use, name in found.items() if name is not None}


def resized(
    images: UInt8[np.ndarray, "n h w c"], image_size: int, progress: Progress | None = None
) -> UInt8[np.ndarray, "n r r c"]:
    """Center crops of `image_size`; images of that size are returned unchanged."""
    if images.shape[1:3] == (image_size, image_size):
        return images
    crops = np.empty((len(images), image_size, image_size, images.shape[3]), np.uint8)
    for index, image in enumerate(images):
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        crops[index] = np.asarray(center_crop(picture, image_size)).reshape(crops.shape[1:])
        if progress is not None and (index + 1) % 256 == 0:
            progress(index + 1, len(images))
    return crops


def _select(names: list[str], asked: str, usual: tuple[str, ...]) -> str | None:
    """The requested array, or the first usual one. Raises ValueError if the requested one is missing."""
    if asked and asked not in names:
        raise ValueError(f"it has no {asked}, but {', '.join(names) or 'nothing'}")
    return asked or next((name for name in usual if name in names), None)


def _checked_images(path: str, images: np.ndarray) -> np.ndarray:
    advice = ""
    if images.dtype.kind == "f":
        advice = " Convert numbers in [-1, 1] by numpy.clip(numpy.round((x + 1) * 127.5), 0, 255).astype(numpy.uint8)."
    elif images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        advice = " Channels come last: numpy.transpose(x, (0, 2, 3, 1))."
    elif images.ndim == 3:
        advice = " Gray images have one channel: x[..., None]."
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise InputError(f"{path}: expected images uint8 [n, height, width, 3], got {_text(images)}.{advice}")
    return images


def _text(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
