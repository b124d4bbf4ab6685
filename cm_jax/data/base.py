"""Data sets and their batches.

A run reads an infinite sequence of images: one permutation of the data set per epoch, which depends on the seed and the
epoch only. Batch k of size B has elements [k B, (k + 1) B) of the sequence and may span epochs. So the position in the
data is the number of batches seen. A run whose batch size changes adds a constant offset to it (`Dataset.shifted`).
"""

import abc
import contextlib
import copy
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from cm_jax.errors import InputError, check_int
from cm_jax.types import ImageSize, in_pixels


class RawBatch(NamedTuple):
    """uint8 images, and labels if the data set has classes."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int32[np.ndarray, " b"] | None


Batches = Generator[RawBatch, None, None]
"""Infinite batches; `close` stops the threads or processes that load them."""


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> Int32[np.ndarray, " n"]:
    """Order of the images in an epoch.

    It is the argsort of raw 64-bit words, because NumPy guarantees a stable stream for them but not for its shuffles: a
    run can be resumed with another NumPy version. A million images take 0.1 s; the result is cached.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


class Dataset(abc.ABC):
    """An open data set of `size` images.

    image_shape: height, width, channels. classes: number of classes; None without labels. class_names: empty without
    classes or names. description: one line for the log.
    """

    content_hash: str | None = None
    """Number of images and hash of their content and labels, wherever they are; None if unknown. Of encoded images, the
    files of at most 1,000 are read, evenly spaced."""

    def __init__(
        self, place: str, size: int, shape: tuple[int, ...], classes: int | None, names: tuple[str, ...], how: str
    ) -> None:
        self.size, self.place = size, place
        self.image_shape: tuple[int, int, int] = shape  # type: ignore[assignment]
        self.classes, self.class_names = classes, names
        self.offset = 0
        labels = f"{classes} classes" if classes else "no labels"
        images = f"{size:,} image{'s' if size != 1 else ''} of {in_pixels(shape)}"
        images += {1: ", gray", 3: ""}.get(shape[2], f", {shape[2]} channels")
        self.description = f"{place}: {images}, {labels}, {how}"

    def renumbered(self, order: Int32[np.ndarray, " classes"], class_names: tuple[str, ...], how: str) -> "Dataset":
        """The same images with label order[i] instead of i. class_names: in the new order. how: for the description."""
        other = copy.copy(self)
        other.class_names = class_names
        other.description = f"{self.description}, classes numbered {how}"
        other._renumber(order)
        return other

    def shifted(self, offset: int) -> "Dataset":
        """The same images, with batch k from position k B + offset of the sequence on. Negative positions are refused
        by `indices`."""
        other = copy.copy(self)
        other.offset = self.offset + offset
        return other

    def indices(self, batch_size: int, seed: int, number: int) -> Int32[np.ndarray, " b"]:
        """Indices of the images in batch `number`."""
        position = check_int("The position in the data", number * batch_size + self.offset, 0, 2**62)
        parts, end = [], position + batch_size
        while position < end:
            epoch, first = divmod(position, self.size)
            parts.append(permutation(self.size, seed, epoch)[first : first + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def batches(self, batch_size: int, seed: int = 0, start: int = 0, host: int = 0, hosts: int = 1) -> Batches:
        """Batches start, start + 1, ...; of each the contiguous share of `host`, an index below `hosts`.

        The concatenated shares of all hosts are the batch of a single host. Raises InputError if `batch_size` is not
        divisible by `hosts`.
        """
        check_int("The batch size", batch_size, 1, 2**31 - 1)
        check_int("The seed", seed, 0, 2**32 - 1)
        check_int("The number of the first batch", start, 0, 2**40)
        check_int("The number of hosts", hosts, 1, 2**20)
        check_int("The number of this host", host, 0, hosts - 1)
        if batch_size % hosts:
            nearest = max(1, round(batch_size / hosts)) * hosts
            raise InputError(f"Batch size {batch_size} is not divisible by {hosts} hosts; use {nearest}.")
        share = batch_size // hosts
        return self._batches(batch_size, seed, start, slice(host * share, (host + 1) * share))

    def first(self, count: int, batch_size: int, start: int = 0) -> Iterator[RawBatch]:
        """Images start ... count - 1 of the sequence with seed 0, in batches; the last batch may be smaller.

        start: a multiple of batch_size.
        """
        with contextlib.closing(self.batches(batch_size, start=start // batch_size)) as stream:
            for position in range(start, count, batch_size):
                images, labels = next(stream)
                rows = slice(count - position)
                yield RawBatch(images[rows], None if labels is None else labels[rows])

    @abc.abstractmethod
    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        """Rows of the batches start, start + 1, ..."""

    @abc.abstractmethod
    def _renumber(self, order: Int32[np.ndarray, " classes"]) -> None:
        """Replace label i by order[i]."""


class InMemory(Dataset):
    """uint8 images [n, h, w, c] and int32 labels [n]. Raises InputError for inconsistent arrays."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Integer[np.ndarray, " m"] | None = None,
        *,
        class_names: tuple[str, ...] = (),
        classes: int | None = None,
        place: str = "an array",
        content_hash: str = "",
    ) -> None:
        if not images.size:
            raise InputError(f"{place} has no images: its shape is {list(images.shape)}.")
        if labels is not None:
            if len(labels) != len(images):
                found = f"got {len(labels)} labels for {len(images)} images"
                raise InputError(f"{place}: expected one label per image, {found}.")
            lowest, highest = int(labels.min()), int(labels.max())
            classes = classes or len(class_names) or check_int("The highest label", highest, 0, 99_999) + 1
            if lowest < 0 or highest >= classes:
                found = f"expected labels in [0, {classes - 1}], got labels from {lowest} to {highest}"
                raise InputError(f"{place}: {found}. Correct them or load the images without labels.")
        else:
            classes, class_names = None, ()
        self.images = images
        self.labels = None if labels is None else labels.astype(np.int32)
        self.content_hash = content_hash or hashed(len(images), class_names, (images, self.labels))
        how = f"in memory ({images.nbytes / 1e6:,.0f} MB)"
        super().__init__(place, len(images), images.shape[1:], classes, tuple(class_names), how)

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        for number in itertools.count(start):
            indices = self.indices(batch_size, seed, number)[rows]
            yield RawBatch(self.images[indices], None if self.labels is None else self.labels[indices])

    def _renumber(self, order: Int32[np.ndarray, " classes"]) -> None:
        self.labels = None if self.labels is None else order[self.labels]


class Generated(Dataset):
    """A data set of batches that a function makes: a generator, or a pipeline such as grain's.

    make(batch_size, seed, start) is an infinite iterator of batches start, start + 1, ... of uint8 images [b, h, w, c]
    and labels [b], or None without classes. Batch k must depend on the seed and on k alone, so that runs can resume.
    size: number of images in an epoch, for messages. Raises InputError, when it is read, for batches that do not fit.
    """

    def __init__(
        self,
        make: Callable[[int, int, int], Iterator[tuple[np.ndarray, np.ndarray | None]]],
        image_shape: tuple[int, int, int],
        size: int,
        *,
        class_names: tuple[str, ...] = (),
        classes: int | None = None,
        place: str = "a generator",
    ) -> None:
        super().__init__(place, size, image_shape, classes or len(class_names) or None, class_names, "streamed")
        self._make = make
        self._order: np.ndarray | None = None

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        if self.offset % batch_size:
            raise InputError(f"{self.place} cannot continue within a batch of another size: keep the batch size.")
        expected, labeled = (batch_size, *self.image_shape), self.classes is not None
        for images, labels in self._make(batch_size, seed, start + self.offset // batch_size):
            images = np.asarray(images)
            if images.dtype != np.uint8 or images.shape != expected:
                found = f"{images.dtype} {list(images.shape)}"
                raise InputError(f"{self.place}: expected uint8 images {list(expected)}, got {found}.")
            if not labeled:
                yield RawBatch(images[rows], None)
                continue
            numbers = np.asarray(labels)
            if numbers.shape != (batch_size,) or numbers.min() < 0 or numbers.max() >= (self.classes or 0):
                raise InputError(f"{self.place}: expected {batch_size} labels below {self.classes}, got {labels}.")
            numbers = numbers if self._order is None else self._order[numbers]
            yield RawBatch(images[rows], numbers.astype(np.int32)[rows])
        raise InputError(f"{self.place} ended: expected infinite batches.")

    def _renumber(self, order: Int32[np.ndarray, " classes"]) -> None:
        self._order = order if self._order is None else order[self._order]


def hashed(count: int, class_names: Iterable[str], parts: Iterable[Any]) -> str:
    """The content hash of `count` images: "3334 images, 0a1b2c3d4e5f6071". parts: bytes, or arrays where known."""
    digest = hashlib.blake2b("\n".join(class_names).encode(), digest_size=8)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part or b"")
    return f"{count} images, {digest.hexdigest()}"


class Data(abc.ABC):
    """A source of images: a frozen dataclass, and a component of TrainConfig."""

    @abc.abstractmethod
    def open(self, image_size: ImageSize, *, channels: int | None = None) -> Dataset:
        """Open the data set with images of this size, resized and center-cropped.

        channels: for image files 1 (gray), 3 (RGB, the default) or 4 (RGBA). Raises InputError if it cannot be used.
        """


def sorted_classes(names: set[str]) -> list[str]:
    """In alphabetical order; in numerical order if all are numbers: 2 before 10."""
    numeric = all(re.fullmatch("[0-9]{1,18}", name) for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


def check_image_size(image_size: ImageSize, most: int = 4096) -> tuple[int, int]:
    """Height and width. Raises InputError if they are invalid."""
    sides = image_size if isinstance(image_size, tuple) and len(image_size) == 2 else (image_size, image_size)
    height, width = (check_int("The image size (pixels of a side)", side, 1, most) for side in sides)
    return height, width
