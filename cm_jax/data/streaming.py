"""Images decoded as they come, by grain: for sets that do not fit in memory."""

import contextlib
import dataclasses
import logging
import multiprocessing.connection
import os
import threading
from typing import Any

import numpy as np

from cm_jax.data.base import Batches, Dataset, RawBatch, batch_indices, described
from cm_jax.data.encoded import THREADS, Encoded, UnreadableError, load, too_many
from cm_jax.errors import InputError

log = logging.getLogger("cm_jax.data")

_FOREVER = 2**62


class Streamed(Dataset):
    """The same batches as `InMemory` of the same images, decoded by threads or by `workers` processes.

    An image that cannot be read is replaced by the next one that can, and named. Raises InputError where grain is not
    installed; iterating does where more than `most_corrupt` images are unreadable.
    """

    def __init__(self, encoded: Encoded, image_size: int, most_corrupt: int = 100, workers: int = 0) -> None:
        try:
            import grain  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{encoded.place} does not fit in the memory that is allowed, and streaming needs grain: "
                "pip install grain, or raise in_memory_gib."
            ) from error
        self.encoded = encoded
        self.most_corrupt = most_corrupt
        self.workers = workers
        self.size = len(encoded)
        self.image_shape = (image_size, image_size, 3)
        self.classes = encoded.classes
        self.class_names = encoded.class_names
        by = f"{workers} process{'es' if workers != 1 else ''}" if workers else f"{THREADS} threads"
        self.description = described(encoded.place, self.size, image_size, self.classes, f"streamed by {by}")

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        import grain

        share = _Share(self.encoded, self.image_shape[0], self.most_corrupt, batch_size, seed, rows)
        threads = 1 if self.workers else THREADS
        stream = grain.MapDataset.range(start, _FOREVER).map(share)
        stream = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self.workers:
            _mark_flags_as_parsed()
            options = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            stream = stream.mp_prefetch(options, worker_init_fn=_end_with_the_parent)
        return self._checked(iter(stream))

    def _checked(self, parts: Any) -> Batches:
        complaints: dict[str, str] = {}
        told = False
        with contextlib.closing(parts):
            for part in parts:
                for name, complaint in part.complaints.items():
                    if name not in complaints:
                        log.warning("Replaced, cannot be read: %s", complaint)
                complaints |= part.complaints
                if len(complaints) > self.most_corrupt or len(complaints) == self.size:
                    raise too_many(self.encoded.place, list(complaints.values()), self.most_corrupt)
                if part.enlarged and not told:
                    told = True
                    where = f"{self.encoded.place}: {part.enlarged} in one batch"
                    log.warning("Images smaller than %d pixels are enlarged. %s.", self.image_shape[0], where)
                yield RawBatch(part.images, None if self.classes is None else part.labels)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A host's share of a batch, and what there is to say about it.

    No tuple, because grain would send its arrays through shared memory, which a run that is killed leaves behind.
    """

    images: np.ndarray
    labels: np.ndarray
    complaints: dict[str, str]
    """A line for each image that cannot be read, by its name."""
    enlarged: int


@dataclasses.dataclass(frozen=True)
class _Share:
    """k -> a host's share of batch k. A pure function of the files, whichever process calls it."""

    encoded: Encoded
    image_size: int
    most_corrupt: int
    batch_size: int
    seed: int
    rows: slice

    def __call__(self, number: int) -> _Part:
        chosen = batch_indices(len(self.encoded), self.batch_size, self.seed, number)[self.rows]
        images = np.zeros((len(chosen), self.image_size, self.image_size, 3), np.uint8)
        labels = np.zeros(len(chosen), np.int32)
        complaints: dict[str, str] = {}
        small = 0
        for row, index in enumerate(chosen):
            image = self._next_good(int(index), complaints)
            if image is not None:
                images[row], labels[row], enlarged = image
                small += enlarged
        return _Part(images, labels, complaints, small)

    def _next_good(self, index: int, complaints: dict[str, str]) -> tuple[np.ndarray, int, bool] | None:
        """Image `index`, or the next that can be read; None after more bad ones than are allowed.

        Whoever reads the complaints then raises: in the main process, not in this one.
        """
        size = len(self.encoded)
        for tried in range(min(size, self.most_corrupt + 1)):
            try:
                return load(self.encoded, (index + tried) % size, self.image_size)
            except UnreadableError as error:
                complaints[error.name] = str(error)
        return None


def _mark_flags_as_parsed() -> None:
    """Grain's worker processes read absl's flags, and die where nobody has parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _end_with_the_parent(worker: int, workers: int) -> None:
    """Called in a worker process: without this, workers wait for ever for a run that was killed."""
    del worker, workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
