"""Sets of image files, or of records that hold them: decoded at once where they fit in memory, else streamed."""

import abc
import concurrent.futures
import dataclasses
import logging
import os

import numpy as np
from jaxtyping import UInt8

from cm_jax.data.base import Data, Dataset, Progress, checked_image_size
from cm_jax.data.decoding import decode
from cm_jax.data.in_memory import InMemory
from cm_jax.errors import InputError, indented_list

log = logging.getLogger("cm_jax.data")

THREADS = min(16, os.cpu_count() or 1)
_CHUNK = 64
"""Images that a thread decodes before it tells of them."""


class Encoded(abc.ABC):
    """Images by number, each in its file format. Picklable, so that worker processes can have it."""

    place: str
    """What the set is called in messages."""
    classes: int | None
    class_names: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What an image is called in messages."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """(the file, the class; 0 where there are none). May raise anything for an image that cannot be read."""


class UnreadableError(Exception):
    """An image that cannot be used, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


def load(encoded: Encoded, index: int, image_size: int) -> tuple[UInt8[np.ndarray, "h w 3"], int, bool]:
    """(pixels, class, whether it was enlarged). Raises UnreadableError."""
    try:
        content, label = encoded.read(index)
        pixels, enlarged = decode(content, image_size)
    except Exception as error:  # every image format has its own kinds for a damaged file
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UnreadableError(encoded.name(index), reason[:200]) from error
    if encoded.classes is not None and not 0 <= label < encoded.classes:
        raise UnreadableError(encoded.name(index), f"label {label} is not one of {encoded.classes} classes")
    return pixels, label, enlarged


def too_many(place: str, complaints: list[str], most: int) -> InputError:
    """What is raised where more than `most` images cannot be read, or none can."""
    if len(complaints) <= most:
        return InputError(
            f"{place}: none of its images can be read. Repair the files or name others:\n  {indented_list(complaints)}"
        )
    number = "1 image" if len(complaints) == 1 else f"{len(complaints)} images"
    return InputError(
        f"{place}: {number} cannot be read, and at most {most} may be left out (most_corrupt); "
        f"replace or remove them, or raise it:\n  {indented_list(complaints)}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedData(Data):
    """What data sets of encoded images have in common."""

    in_memory_gib: float = 4.0
    """Images are decoded once, at the start, if they take no more than this; larger sets are decoded as they come."""
    most_corrupt: int = 100
    """Images that cannot be read are named in the log and passed over, up to this many."""
    workers: int = 0
    """Processes that decode images as they come; 0: threads of this process."""

    def __post_init__(self) -> None:
        if not (self.in_memory_gib >= 0 and self.most_corrupt >= 0 and 0 <= self.workers <= 1024):
            raise InputError(f"{self}: in_memory_gib, most_corrupt and workers (up to 1024) cannot be negative.")

    def open_encoded(self, encoded: Encoded, image_size: int, progress: Progress | None) -> Dataset:
        """In memory or streamed, as it fits."""
        from cm_jax.data.streaming import Streamed

        needed = len(encoded) * checked_image_size(image_size) ** 2 * 3
        if needed <= self.in_memory_gib * 2**30:
            return decoded(encoded, image_size, self.most_corrupt, progress)
        return Streamed(encoded, image_size, self.most_corrupt, self.workers)


def decoded(encoded: Encoded, image_size: int, most_corrupt: int, progress: Progress | None = None) -> InMemory:
    """All images, decoded by threads, in their order; those that cannot be read are named and left out.

    Raises InputError where there are more than `most_corrupt` of them, or no others.
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
                log.warning("Left out, cannot be read: %s", complaint)
            if len(complaints) > most_corrupt or len(complaints) == count:
                raise too_many(encoded.place, complaints, most_corrupt)
            if progress is not None:
                progress(min(done * _CHUNK, count), count)
    finally:
        pool.shutdown(cancel_futures=True)
    if small:
        where = f"{encoded.place}: {small} of {count}"
        log.warning("Images smaller than %d pixels were enlarged. %s.", image_size, where)
    kept = np.flatnonzero(good)
    if len(kept) < count:
        for place, index in enumerate(kept):  # in place: a second copy of everything might not fit
            images[place], labels[place] = images[index], labels[index]
    return InMemory(
        images[: len(kept)],
        None if encoded.classes is None else labels[: len(kept)],
        class_names=encoded.class_names,
        classes=encoded.classes,
        place=encoded.place,
    )
