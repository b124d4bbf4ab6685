"""Graceful stop: signals set a flag that the training loop checks between dispatches."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
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

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # Python's handler would wait for the compiler to return
            os.write(2, b"\nStopping after this step and saving. Press Ctrl-C again to kill at once.\n")
