"""Streaming with grain, for data sets that do not fit in memory."""

import contextlib
import dataclasses
import logging
import multiprocessing.connection
import os
import threading
from typing import Any

import numpy as np

from cm_jax.data.base import Batches, Dataset, RawBatch, batch_indices, describe
from cm_jax.data.encoded import THREADS, Encoded, UnreadableError, load, too_many_unreadable
from cm_jax.errors import InputError

log = logging.getLogger("cm_jax.data")

_FOREVER = 2**62


class Streamed(Dataset):
    """The same batches as of `InMemory`, decoded on the fly by threads or by `workers` processes.

    An unreadable image is logged and replaced by the next readable one. Raises InputError if grain is not installed,
    and while iterating if more than `max_corrupt` images are unreadable.
    """

    def __init__(self, encoded: Encoded, image_size: int, max_corrupt: int = 100, workers: int = 0) -> None:
        try:
            import grain  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{encoded.place} is larger than in_memory_gib, and streaming needs grain: "
                "pip install grain, or raise in_memory_gib."
            ) from error
        self.encoded = encoded
        self.max_corrupt = max_corrupt
        self.workers = workers
        self.size = len(encoded)
        self.image_shape = (image_size, image_size, 3)
        self.classes = encoded.classes
        self.class_names = encoded.class_names
        by = f"{workers} process{'es' if workers != 1 else ''}" if workers else f"{THREADS} threads"
        self.description = describe(encoded.place, self.size, image_size, self.classes, f"streamed by {by}")

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        import grain

        share = _LoadShare(self.encoded, self.image_shape[0], self.max_corrupt, batch_size, seed, rows)
        threads = 1 if self.workers else THREADS
        stream = grain.MapDataset.range(start, _FOREVER).map(share)
        stream = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain's processes read absl's flags
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            stream = stream.mp_prefetch(options, worker_init_fn=_end_with_the_parent)
        return self._checked(iter(stream))

    def _checked(self, parts: Any) -> Batches:
        complaints: dict[str, str] = {}
        warned = False
        with contextlib.closing(parts):
            for part in parts:
                for name, complaint in part.complaints.items():
                    if name not in complaints:
                        log.warning("Replaced an unreadable image: %s", complaint)
                complaints |= part.complaints
                if len(complaints) > self.max_corrupt or len(complaints) == self.size:
                    raise too_many_unreadable(self.encoded.place, list(complaints.values()), self.max_corrupt)
                if part.enlarged and not warned:
                    warned = True
                    where = f"{self.encoded.place}: {part.enlarged} in one batch"
                    log.warning("Images smaller than %d pixels are enlarged. %s.", self.image_shape[0], where)
                yield RawBatch(part.images, None if self.classes is None else part.labels)


@dataclasses.dataclass(frozen=True)
class _Share:
    """A host's share of a batch.

    Not a tuple, because grain would send its arrays through shared memory, which a killed run does not free.
    """

    images: np.ndarray
    labels: np.ndarray
    complaints: dict[str, str]
    """Name of an unreadable image -> error message."""
    enlarged: int


@dataclasses.dataclass(frozen=True)
class _LoadShare:
    """k -> a host's share of batch k, a pure function of the files."""

    encoded: Encoded
    image_size: int
    max_corrupt: int
    batch_size: int
    seed: int
    rows: slice

    def __call__(self, number: int) -> _Share:
        indices = batch_indices(len(self.encoded), self.batch_size, self.seed, number)[self.rows]
        images = np.zeros((len(indices), self.image_size, self.image_size, 3), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        complaints: dict[str, str] = {}
        enlarged_count = 0
        for row, index in enumerate(indices):
            image = self._next_good(int(index), complaints)
            if image is not None:
                images[row], labels[row], enlarged = image
                enlarged_count += enlarged
        return _Share(images, labels, complaints, enlarged_count)

    def _next_good(self, index: int, complaints: dict[str, str]) -> tuple[np.ndarray, int, bool] | None:
        """Image `index` or the next readable one; None after too many unreadable ones: the main process then raises."""
        size = len(self.encoded)
        for skipped in range(min(size, self.max_corrupt + 1)):
            try:
                return load(self.encoded, (index + skipped) % size, self.image_size)
            except UnreadableError as error:
                complaints[error.name] = str(error)
        return None


def _end_with_the_parent(worker: int, workers: int) -> None:
    """End a worker process with its parent: otherwise workers outlive a killed run."""
    del worker, workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
