"""Data sets of encoded images: decoded in memory if they fit, else streamed with grain."""

import abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import multiprocessing.connection
import os
import signal
import threading

import numpy as np
from jaxtyping import Int32, UInt8

from cm_jax.data.base import Batches, Data, Dataset, InMemory, RawBatch, check_image_size, hashed
from cm_jax.data.decoding import MODES, decode
from cm_jax.errors import InputError, indented_list
from cm_jax.progress import activity
from cm_jax.types import ImageSize, in_pixels

log = logging.getLogger("cm_jax.data")

THREADS = min(16, os.cpu_count() or 1)
Shape = tuple[int, int, int]
"""Height, width and channels of images."""
_HASHED = 1_000
"""Largest number of images whose files are read for the content hash."""
_CHUNK = 64
"""Images that a thread decodes before its progress is counted."""


@dataclasses.dataclass(eq=False)
class Encoded(abc.ABC):
    """Encoded images by index. Picklable, for worker processes. `place` names the data set in messages."""

    place: str
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedData(Data):
    """Base of data sets of encoded images."""

    in_memory_gib: float = 4.0
    """Decode all images at the start if they need at most this many GiB. Larger data sets are streamed."""
    max_corrupt: int = 100
    """Maximum number of unreadable images, which are logged and replaced by the next readable one."""
    workers: int = 0
    """Processes that decode streamed images. 0: threads."""

    def __post_init__(self) -> None:
        if not (self.in_memory_gib >= 0 and self.max_corrupt >= 0 and 0 <= self.workers <= 1024):
            raise InputError(f"Expected in_memory_gib >= 0, max_corrupt >= 0 and workers in [0, 1024], got {self}.")

    def open(self, image_size: ImageSize, *, channels: int | None = None) -> Dataset:
        """In memory if it fits, else streamed."""
        shape = (*check_image_size(image_size), channels or 3)
        if shape[2] not in MODES:
            problem = f"Expected 1 (gray), 3 (RGB) or 4 (RGBA) channels for image files, got {channels}"
            raise InputError(f"{problem}: put images with other channels into an .npz file (NpzData).")
        with activity("Listing the images"):
            encoded = self.encoded()
        if len(encoded) * math.prod(shape) <= self.in_memory_gib * 2**30:
            return decode_all(encoded, shape, self.max_corrupt)
        return Streamed(encoded, shape, self.max_corrupt, self.workers)

    @abc.abstractmethod
    def encoded(self) -> Encoded:
        """The images. Raises InputError if they cannot be used."""


class UnreadableError(Exception):
    """An image cannot be used. args: its name and the reason."""


def _load(encoded: Encoded, index: int, shape: Shape) -> tuple[UInt8[np.ndarray, "h w c"], int, bool]:
    """(pixels, class, whether the image was enlarged). Raises UnreadableError."""
    try:
        content, label = encoded.read(index)
        pixels, enlarged = decode(content, shape[:2], shape[2])
        if encoded.classes is not None and not 0 <= label < encoded.classes:
            raise ValueError(f"expected a label in [0, {encoded.classes - 1}], got {label}")
        return pixels, label, enlarged
    except Exception as error:  # image formats raise many types for damaged files
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UnreadableError(encoded.name(index), reason[:200]) from error


def _report(encoded: Encoded, reasons: dict[str, str], new: dict[str, str], most: int) -> None:
    """Log `new` unreadable images (name -> reason), which are replaced, and add them to `reasons`.

    Raises InputError if there are more than `most` of them, or no readable image.
    """
    for name, reason in new.items():
        if name not in reasons:
            log.warning("Replaced an unreadable image: %s: %s", name, reason)
    reasons |= new
    if len(reasons) > most:
        unreadable = f"{len(reasons)} image{'s' if len(reasons) != 1 else ''} cannot be read, more than max_corrupt"
        problem = f"{unreadable} = {most}. Repair or remove them, or raise max_corrupt"
    elif len(reasons) == len(encoded):
        problem = "no image can be read. Repair the files or give others"
    else:
        return
    complaints = [f"{name}: {reason}" for name, reason in reasons.items()]
    raise InputError(f"{encoded.place}: {problem}:\n  {indented_list(complaints)}")


def decode_all(encoded: Encoded, shape: Shape, max_corrupt: int) -> InMemory:
    """All images, decoded by threads, in their order.

    An unreadable image is logged and replaced by the next readable one, as in `Streamed`. Raises InputError if there
    are more than `max_corrupt` of them, or no others.
    """
    count = len(encoded)
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)
    good, small = np.zeros((2, count), bool)
    unreadable: dict[str, str] = {}

    def fill(first: int) -> dict[str, str]:
        reasons = {}
        for index in range(first, min(first + _CHUNK, count)):
            try:
                images[index], labels[index], small[index] = _load(encoded, index, shape)
                good[index] = True
            except UnreadableError as error:
                name, reason = error.args
                reasons[name] = reason
        return reasons

    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    with activity(f"Decoding {encoded.place}", total=count) as shown:
        try:
            for reasons in pool.map(fill, range(0, count, _CHUNK)):
                _report(encoded, unreadable, reasons, max_corrupt)
                shown.advance(min(_CHUNK, count - shown.done))
        finally:
            pool.shutdown(cancel_futures=True)
    if small.any():
        where = f"{encoded.place}: {small.sum()} of {count}"
        log.warning("Images smaller than %s were enlarged. %s.", in_pixels(shape), where)
    bad, readable = np.flatnonzero(~good), np.flatnonzero(good)
    replacements = readable[np.searchsorted(readable, bad) % len(readable)]
    images[bad], labels[bad] = images[replacements], labels[replacements]
    return InMemory(
        images,
        None if encoded.classes is None else labels,
        class_names=encoded.class_names,
        classes=encoded.classes,
        place=encoded.place,
        content_hash=content_hash(encoded),
    )


def content_hash(encoded: Encoded) -> str:
    """Hash of the encoded content and the classes of images; those that cannot be read count as empty."""

    def part(index: int) -> bytes:
        try:
            content, label = encoded.read(index)
        except Exception:  # reported where the image is decoded
            content, label = b"", 0
        return hashlib.blake2b(b"%d " % label + content, digest_size=8).digest()

    indices = np.unique(np.linspace(0, len(encoded) - 1, _HASHED, dtype=int)).tolist()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return hashed(len(encoded), encoded.class_names, pool.map(part, indices))


@dataclasses.dataclass(frozen=True)
class _Share:
    """A host's share of a batch.

    Not a tuple, because grain would send its arrays through shared memory, which a killed run does not free.
    """

    batch: RawBatch
    unreadable: dict[str, str]
    """Name of an unreadable image -> reason."""
    enlarged: int


class Streamed(Dataset):
    """The same batches as of `InMemory`, decoded on the fly by threads or by `workers` processes.

    An unreadable image is logged and replaced by the next readable one. Raises InputError if grain is not installed,
    and while iterating if more than `max_corrupt` images are unreadable.
    """

    def __init__(self, encoded: Encoded, shape: Shape, max_corrupt: int = 100, workers: int = 0) -> None:
        try:
            import grain  # noqa: F401
        except ImportError as error:
            reason = f"{encoded.place} is larger than in_memory_gib, and streaming needs grain"
            raise InputError(f"{reason}: pip install grain, or raise in_memory_gib.") from error
        self.encoded, self.max_corrupt, self.workers = encoded, max_corrupt, workers
        by = f"{workers} process{'es' if workers != 1 else ''}" if workers else f"{THREADS} threads"
        self._order: np.ndarray | None = None
        self.content_hash = content_hash(encoded)
        how = f"streamed by {by}"
        super().__init__(encoded.place, len(encoded), shape, encoded.classes, encoded.class_names, how)

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        import grain

        share = functools.partial(self._share, batch_size, seed, rows)
        threads = 1 if self.workers else THREADS
        stream = grain.MapDataset.range(start, 2**62).map(share)
        stream = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain's processes read absl's flags
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            stream = stream.mp_prefetch(options, worker_init_fn=_end_with_the_parent)
        unreadable: dict[str, str] = {}
        warned = False
        with contextlib.closing(iter(stream)) as parts:
            for part in parts:
                _report(self.encoded, unreadable, part.unreadable, self.max_corrupt)
                if part.enlarged and not warned:
                    warned = True
                    where = f"{self.encoded.place}: {part.enlarged} in one batch"
                    log.warning("Images smaller than %s are enlarged. %s.", in_pixels(self.image_shape), where)
                images, labels = part.batch
                yield RawBatch(images, labels if labels is None or self._order is None else self._order[labels])

    def _renumber(self, order: Int32[np.ndarray, " classes"]) -> None:
        self._order = order if self._order is None else order[self._order]

    def _share(self, batch_size: int, seed: int, rows: slice, number: int) -> _Share:
        """Rows of batch `number`, a pure function of the files.

        An unreadable image is replaced by the next readable one; after too many of them by zeros: `_batches` raises.
        """
        indices = self.indices(batch_size, seed, number)[rows].tolist()
        images = np.zeros((len(indices), *self.image_shape), np.uint8)
        labels, small = np.zeros(len(indices), np.int32), np.zeros(len(indices), bool)
        unreadable: dict[str, str] = {}
        for row, index in enumerate(indices):
            for candidate in range(index, index + min(self.size, self.max_corrupt + 1)):
                try:
                    loaded = _load(self.encoded, candidate % self.size, self.image_shape)
                    images[row], labels[row], small[row] = loaded
                    break
                except UnreadableError as error:
                    name, reason = error.args
                    unreadable[name] = reason
        return _Share(RawBatch(images, None if self.classes is None else labels), unreadable, int(small.sum()))


def _end_with_the_parent(*_: int) -> None:
    """End a worker process with its parent, neither later nor earlier.

    Without it, workers outlive a killed run, and a signal to all processes of a run, such as Ctrl-C, ends the worker
    before the run has saved a checkpoint.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
