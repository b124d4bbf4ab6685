"""Coordination of several processes (jax.distributed): errors, flags and arrays that they exchange.

All processes must call these functions together.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cm_jax.errors import DamagedError, InputError, indented_list

_MAX_MESSAGE_BYTES = 2000
_PIECE_BYTES = 2**26
"""Bytes that are sent at once; every device needs memory for them."""


@contextlib.contextmanager
def raised_in_all() -> Iterator[None]:
    """An InputError raised in the block by one process is raised in all, so that none waits for the others.

    All processes must enter this block, which must not communicate with them otherwise.
    """
    failure: InputError | None = None
    try:
        yield
    except InputError as error:
        failure = error
    if jax.process_count() > 1:
        own = str(failure or "").encode()[:_MAX_MESSAGE_BYTES].ljust(_MAX_MESSAGE_BYTES, b"\0")
        damaged = np.asarray([isinstance(failure, DamagedError)])
        messages, kinds = multihost_utils.process_allgather((np.frombuffer(own, np.uint8), damaged))
        for process, (message, kind) in enumerate(zip(messages, kinds, strict=True)):
            if message.any() and failure is None:
                text = f"process {process}: {bytes(message[message > 0]).decode(errors='replace')}"
                failure = DamagedError(text) if kind.any() else InputError(text)
    if failure is not None:
        raise failure


class Delayed:
    """InputErrors in the parts of a loop between which processes do not communicate, until `exchange`.

    A process continues after its error, because the others wait for its part of every training step.
    """

    def __init__(self) -> None:
        self._first: InputError | None = None

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keep an InputError of the block; in a run of one process it is raised."""
        try:
            yield
        except InputError as error:
            if jax.process_count() == 1:
                raise
            self._first = self._first or error

    def exchange(self) -> None:
        """Raise the first error of any process in all."""
        with raised_in_all():
            if self._first is not None:
                raise self._first


def check_equal(values: Mapping[str, Any]) -> None:
    """Raise an InputError in all processes if a value differs from that of process 0. All give the same names."""
    own = [np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8) for value in values.values()]
    found = multihost_utils.process_allgather(np.stack(own))
    different = (found != found[0]).any(axis=2)
    others = {name: np.flatnonzero(different[:, place]) for place, name in enumerate(values)}
    if lines := [f"{name}: process {', '.join(map(str, each))}" for name, each in others.items() if each.size]:
        problem = "All processes need the same settings and files. Those of process 0 differ from"
        raise InputError(f"{problem}:\n  {indented_list(lines)}")


def from_first(number: int) -> int:
    """The number that process 0 gives."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def in_any(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def share_of_process(count: int, unit: int = 1) -> tuple[int, int]:
    """(first, last): this process's contiguous share of range(count), in multiples of `unit` but for the end."""
    units, process, processes = -(-count // unit), jax.process_index(), jax.process_count()
    first, last = (edge * units // processes * unit for edge in (process, process + 1))
    return min(first, count), min(last, count)


def from_all(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each process in turn, bitwise, in every process. Names, shapes and dtypes may differ.

    They are sent as bytes, because JAX has no float64 by default, and one process at a time to limit memory. Every
    process must read the iterator to its end.
    """
    if jax.process_count() == 1:
        yield dict(arrays)
        return
    file, me = io.BytesIO(), jax.process_index()
    np.savez(file, allow_pickle=False, **arrays)
    own = np.frombuffer(file.getvalue(), np.uint8)
    sizes = multihost_utils.process_allgather(np.frombuffer(np.int64(own.size).tobytes(), np.uint8))
    for process, size in enumerate(np.ascontiguousarray(sizes).view(np.int64)[:, 0]):
        sent = own if process == me else np.zeros(size, np.uint8)
        pieces = (sent[start : start + _PIECE_BYTES] for start in range(0, size, _PIECE_BYTES))
        received = [multihost_utils.broadcast_one_to_all(piece, process == me) for piece in pieces]
        with np.load(io.BytesIO(np.concatenate(received).tobytes())) as found:
            yield dict(found)
