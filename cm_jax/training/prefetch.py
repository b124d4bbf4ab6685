"""Batches for the compiled step, loaded in the background: images, or indices into a resident data set."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cm_jax.data import Dataset, InMemory
from cm_jax.training.state import StepBatch

MAX_RESIDENT_BYTES = 512 * 2**20
"""Larger data sets are not copied to the devices."""


def is_resident(dataset: Dataset) -> bool:
    return isinstance(dataset, InMemory) and dataset.images.nbytes <= MAX_RESIDENT_BYTES


def dispatches(
    dataset: Dataset, *, batch_size: int, seed: int, start: int, stop: int, steps: int, labeled: bool, resident: bool
) -> Iterator[StepBatch]:
    """This process's share of batches start ... stop - 1 as NumPy arrays [steps, b, ...]; the last may be shorter."""
    host, hosts = jax.process_index(), jax.process_count()
    if resident:
        assert isinstance(dataset, InMemory)
        share = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        batches = (StepBatch(indices=dataset.indices(batch_size, seed, number)[share]) for number in range(start, stop))
    else:
        read = dataset.batches(batch_size, seed, start, host, hosts)
        batches = (StepBatch(batch.images, batch.labels if labeled else None) for batch in read)
    for number in range(start, stop, steps):
        group = [next(batches) for _ in range(min(steps, stop - number))]
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *group)


@contextlib.contextmanager
def prefetch(items: Iterator[Any], depth: int = 2) -> Iterator[Iterator[Any]]:
    """The same items, of which a thread prepares `depth` in advance. Its exceptions are raised in the reader."""
    ready: queue.Queue = queue.Queue(depth)
    closing = threading.Event()

    def offer(item: Any) -> bool:
        while not closing.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer((None, StopIteration()))
        except BaseException as error:
            offer((None, error))

    def read() -> Iterator[Any]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        closing.set()
        thread.join()
