"""Signals to the process, and coordination of several processes (jax.distributed)."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cm_jax.checkpoints.state_archive import DamagedError
from cm_jax.errors import InputError

_MAX_MESSAGE_BYTES = 2000
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal(contextlib.AbstractContextManager["StopSignal"]):
    """While entered, SIGTERM (sent by schedulers) and SIGINT (Ctrl-C) set `requested` instead of ending the process.

        with StopSignal() as stop:
            while not stop.requested: ...

    A second Ctrl-C kills the process at once, even during compilation. Only the main thread receives signals, so in
    another thread this does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the received signal."""
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # Python's handler would wait for the compiler to return
            os.write(2, b"\nStopping after this step and saving. Press Ctrl-C again to kill at once.\n")


@contextlib.contextmanager
def raised_in_all() -> Iterator[None]:
    """An InputError raised in the block by one process is raised in all, so that none waits for the others.

    All processes must enter this block, and call the functions below.
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


def from_first(number: int) -> int:
    """The number that process 0 gives."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def in_any(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
