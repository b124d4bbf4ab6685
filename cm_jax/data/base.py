"""What every data set is: images by number, and batches whose place in the run is one integer.

The run sees one endless row of images: epoch after epoch, each a permutation of the whole set that depends on the seed
and the epoch alone. Batch k of B images is [k B, (k + 1) B) of that row, also across the border of two epochs and
where B exceeds the set. So the position in the data is k, the number of batches seen, and resuming needs nothing else.
"""

import abc
import functools
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from cm_jax.errors import InputError, check_int

LARGEST_SEED = 2**32 - 1
LARGEST_NUMBER = 2**40
"""Of a batch."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while a data set is opened."""


class RawBatch(NamedTuple):
    """Images as they are stored, and their classes where there are any."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int32[np.ndarray, " b"] | None


Batches = Generator[RawBatch, None, None]
"""Batches without end; `close` ends the threads or processes that make them."""


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> Int32[np.ndarray, " n"]:
    """The order of an epoch: every number below `size` once.

    Ranks of raw 64-bit words, whose stream numpy promises never to change (it does not promise that of its shuffles):
    a run can be resumed under another numpy. An epoch of a million images takes 0.1 s, and is kept for its batches.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def batch_indices(size: int, batch_size: int, seed: int, number: int) -> Int32[np.ndarray, " b"]:
    """Which of `size` images are in batch `number`, in order."""
    parts, position, end = [], number * batch_size, (number + 1) * batch_size
    while position < end:
        epoch, first = divmod(position, size)
        parts.append(permutation(size, seed, epoch)[first : first + end - position])
        position += len(parts[-1])
    return np.concatenate(parts)


class Dataset(abc.ABC):
    """An open data set."""

    size: int
    """Number of images."""
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    classes: int | None
    """Number of classes; None where the images have no labels."""
    class_names: tuple[str, ...]
    """Name of class 0, 1, ...; empty where there are no classes or no names."""
    description: str
    """One line for the log."""

    def indices(self, batch_size: int, seed: int, number: int) -> Int32[np.ndarray, " b"]:
        """Which images are in batch `number`: for whoever keeps all of them on the device and gathers there."""
        check_int("The batch size", batch_size, 1, 2**31 - 1)
        check_int("The seed", seed, 0, LARGEST_SEED)
        check_int("The number of a batch", number, 0, LARGEST_NUMBER)
        return batch_indices(self.size, batch_size, seed, number)

    def batches(self, batch_size: int, seed: int = 0, start: int = 0, host: int = 0, hosts: int = 1) -> Batches:
        """Batch `start`, start + 1, ...; of each the contiguous share of host number `host`.

        The shares of all hosts, one after the other, are the batch of `batch_size` images that one host would get.
        Raises InputError where the batch cannot be shared out evenly.
        """
        check_int("The batch size", batch_size, 1, 2**31 - 1)
        check_int("The seed", seed, 0, LARGEST_SEED)
        check_int("The number of the first batch", start, 0, LARGEST_NUMBER)
        check_int("The number of hosts", hosts, 1, 2**20)
        check_int("The number of this host", host, 0, hosts - 1)
        if batch_size % hosts:
            nearest = max(1, round(batch_size / hosts)) * hosts
            raise InputError(f"A batch of {batch_size} cannot be shared among {hosts} hosts: {nearest} can.")
        share = batch_size // hosts
        return self._batches(batch_size, seed, start, slice(host * share, (host + 1) * share))

    @abc.abstractmethod
    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        """The `rows` of each batch from number `start` on."""


class Data(abc.ABC):
    """Where images come from. Each kind is a frozen dataclass, and a setting of the run."""

    @abc.abstractmethod
    def open(self, image_size: int, progress: Progress | None = None) -> Dataset:
        """The data set at `image_size` pixels a side. Raises InputError where it cannot be used."""


def checked_image_size(image_size: int, most: int = 4096) -> int:
    """`image_size`, one number for height and width. Raises InputError for what is none."""
    return check_int("The image size (pixels of a side)", image_size, 1, most)


def described(place: str, size: int, image_size: int, classes: int | None, how: str) -> str:
    """A data set in one line."""
    labels = f"{classes} classes" if classes else "no labels"
    return f"{place}: {size:,} image{'s' if size != 1 else ''} of {image_size} pixels, {labels}, {how}"
