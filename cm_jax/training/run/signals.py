"""Being asked to stop: a flag that the loop reads between two dispatches."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """While it is entered, SIGTERM (what schedulers send) and SIGINT (Ctrl-C) set `requested` instead of ending us.

        with Stop() as stop:
            while not stop.requested: ...

    A second Ctrl-C kills the process at once, even inside a long compilation. Signals reach the main thread alone, so
    in another one this does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that came."""
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # Python's own handler would wait for the compiler to return
            os.write(2, b"\nStopping after this step and saving; Ctrl-C again kills at once.\n")
