"""Signals that stop a run."""

import contextlib
import os
import signal
import threading
from typing import Any

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
