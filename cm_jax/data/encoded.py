"""Data sets of encoded images: decoded in memory if they fit, else streamed."""

import abc
import concurrent.futures
import dataclasses
import logging
import os

import numpy as np
from jaxtyping import UInt8

from cm_jax.data.base import Data, Dataset, InMemory, Progress, check_image_size
from cm_jax.data.decoding import decode
from cm_jax.errors import InputError, indented_list

log = logging.getLogger("cm_jax.data")

THREADS = min(16, os.cpu_count() or 1)
_CHUNK = 64
"""Images that a thread decodes between progress reports."""


class Encoded(abc.ABC):
    """Encoded images by index. Picklable, for worker processes."""

    place: str
    """Name of the data set in messages."""
    classes: int | None
    class_names: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Name of an image in messages."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """(content of the file, class or 0). May raise any exception for an unreadable image."""


class UnreadableError(Exception):
    """An image cannot be used."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


def load(encoded: Encoded, index: int, image_size: int) -> tuple[UInt8[np.ndarray, "h w 3"], int, bool]:
    """(pixels, class, whether the image was enlarged). Raises UnreadableError."""
    try:
        content, label = encoded.read(index)
        pixels, enlarged = decode(content, image_size)
    except Exception as error:  # image formats raise many types for damaged files
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UnreadableError(encoded.name(index), reason[:200]) from error
    if encoded.classes is not None and not 0 <= label < encoded.classes:
        raise UnreadableError(encoded.name(index), f"expected a label in [0, {encoded.classes - 1}], got {label}")
    return pixels, label, enlarged


def too_many_unreadable(place: str, complaints: list[str], most: int) -> InputError:
    """The error for more than `most` unreadable images, or for no readable one."""
    if len(complaints) <= most:
        return InputError(
            f"{place}: no image can be read. Repair the files or give others:\n  {indented_list(complaints)}"
        )
    number = "1 image" if len(complaints) == 1 else f"{len(complaints)} images"
    return InputError(
        f"{place}: {number} cannot be read, more than max_corrupt = {most}. "
        f"Repair or remove them, or raise max_corrupt:\n  {indented_list(complaints)}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedData(Data):
    """Base of data sets of encoded images."""

    in_memory_gib: float = 4.0
    """Decode all images at the start if they need at most this many GiB. Larger data sets are streamed."""
    max_corrupt: int = 100
    """Maximum number of unreadable images, which are logged and skipped."""
    workers: int = 0
    """Processes that decode streamed images. 0: threads."""

    def __post_init__(self) -> None:
        if not (self.in_memory_gib >= 0 and self.max_corrupt >= 0 and 0 <= self.workers <= 1024):
            raise InputError(f"Expected in_memory_gib >= 0, max_corrupt >= 0 and workers in [0, 1024], got {self}.")

    def open_encoded(self, encoded: Encoded, image_size: int, progress: Progress | None) -> Dataset:
        """In memory if it fits, else streamed."""
        from cm_jax.data.streaming import Streamed

        needed = len(encoded) * check_image_size(image_size) ** 2 * 3
        if needed <= self.in_memory_gib * 2**30:
            return decode_all(encoded, image_size, self.max_corrupt, progress)
        return Streamed(encoded, image_size, self.max_corrupt, self.workers)


def decode_all(encoded: Encoded, image_size: int, max_corrupt: int, progress: Progress | None = None) -> InMemory:
    """All images, decoded by threads, in their order; those that cannot be read are named and left out.

    Raises InputError where there are more than `max_corrupt` of them, or no others.
    """
    count = len(encoded)
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    labels = np.empty(count, np.int32)
    good = np.zeros(count, bool)
    complaints: list[str] = []
    small = 0

    def fill(first: int) -> tuple[list[str], int]:
        unreadable, enlarged = [], 0
        for index in range(first, min(first + _CHUNK, count)):
            try:
                images[index], labels[index], smaller = load(encoded, index, image_size)
                good[index], enlarged = True, enlarged + smaller
            except UnreadableError as error:
                unreadable.append(str(error))
        return unreadable, enlarged

    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        for done, (unreadable, enlarged) in enumerate(pool.map(fill, range(0, count, _CHUNK)), 1):
            complaints += unreadable
            small += enlarged
            for complaint in unreadable:
                log.warning("Skipped an unreadable image: %s", complaint)
            if len(complaints) > max_corrupt or len(complaints) == count:
                raise too_many_unreadable(encoded.place, complaints, max_corrupt)
            if progress is not None:
                progress(min(done * _CHUNK, count), count)
    finally:
        pool.shutdown(cancel_futures=True)
    if small:
        where = f"{encoded.place}: {small} of {count}"
        log.warning("Images smaller than %d pixels were enlarged. %s.", image_size, where)
    kept = np.flatnonzero(good)
    if len(kept) < count:
        for place, index in enumerate(kept):  # in place, because a second copy might not fit
            images[place], labels[place] = images[index], labels[index]
    return InMemory(
        images[: len(kept)],
        None if encoded.classes is None else labels[: len(kept)],
        class_names=encoded.class_names,
        classes=encoded.classes,
        place=encoded.place,
    )
