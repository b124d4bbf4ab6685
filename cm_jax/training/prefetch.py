"""Batches for the compiled step: numbers into a data set on the devices, or the images themselves, fetched ahead."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cm_jax.data import Dataset, InMemory
from cm_jax.training.state import RawBatch

LARGEST_RESIDENT = 512 * 2**20
"""Bytes of a data set that is put on the devices whole."""


def is_resident(dataset: Dataset) -> bool:
    return isinstance(dataset, InMemory) and dataset.images.nbytes <= LARGEST_RESIDENT


def dispatches(
    dataset: Dataset, *, batch_size: int, seed: int, start: int, stop: int, steps: int, labelled: bool, resident: bool
) -> Iterator[RawBatch]:
    """This process's share of batches start ... stop - 1, `steps` at a time, at the end maybe fewer: NumPy arrays
    [steps, b, ...]."""
    host, hosts = jax.process_index(), jax.process_count()
    if resident:
        assert isinstance(dataset, InMemory)
        share = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        singles = (RawBatch(numbers=dataset.indices(batch_size, seed, number)[share]) for number in range(start, stop))
    else:
        read = dataset.batches(batch_size, seed, start, host, hosts)
        singles = (RawBatch(batch.images, batch.labels if labelled else None) for batch in read)
    for number in range(start, stop, steps):
        together = [next(singles) for _ in range(min(steps, stop - number))]
        yield jax.tree.map(lambda *parts: np.stack(parts), *together)


@contextlib.contextmanager
def ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Iterator[Any]]:
    """The same items, made by a thread that keeps `depth` of them ready. What it raises is raised to the reader."""
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
        except BaseException as error:  # whatever it is, the reader is to know
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
