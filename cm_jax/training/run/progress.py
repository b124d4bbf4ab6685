"""Progress of a run: a bar on a terminal, otherwise lines of text."""

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Iterator

import jax
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from cm_jax.progress import Activity, listening, terminal

_SMOOTHING = 0.9
"""Decay per update of the images and seconds whose ratio is images/s."""


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Batches done, images/s, loss and time left.

        with Progress(done, total, batch_size) as progress:
            progress.update(done, loss)

    On a terminal, a bar on standard error. Otherwise lines on standard output: the first, the last, and one every
    `every` seconds. Only process 0 shows it.
    """

    def __init__(self, done: int, total: int, batch_size: int, every: float = 10.0) -> None:
        self.images_per_second: float | None = None
        """Smoothed, without compilation, which ends before the first update. None until the second update."""
        self._done, self._total, self._batch_size, self._every = done, total, batch_size, every
        self._images = self._seconds = 0.0
        self._time: float | None = None
        self._printed, self._last_line = -math.inf, ""
        self._quiet = jax.process_index() != 0
        console = None if self._quiet else terminal()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rest]!s}"))
        self._bar = rich.progress.Progress(
            *columns, console=console, disable=console is None, redirect_stdout=sys.stdout.isatty()
        )
        self._rest: str | Activity = ""
        self._task = self._bar.add_task("batches", total=total, completed=done, rest=self._rest)
        self._listening = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        self._outer = self._listening.enter_context(listening(self._other_work))
        if not self._bar.disable:
            self._bar.start()
            self._bar.console.show_cursor(True)  # a killed run would leave the terminal without it
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        if not self._bar.disable:
            self._bar.stop()
        elif self._last_line:
            print(self._last_line, flush=True)

    @contextlib.contextmanager
    def _other_work(self, activity: Activity) -> Iterator[None]:
        """Around other work than training: the bar names it, and its time does not count in images/s."""
        before = self._rest
        self._show(activity)
        with self._outer(activity) if self._bar.disable else contextlib.nullcontext():
            yield
        self._show(before)
        self._time = None

    def _show(self, rest: str | Activity) -> None:
        self._rest = rest
        self._bar.update(self._task, rest=rest, completed=self._done)

    def update(self, done: int, loss: float | None = None) -> None:
        """`done` batches are done; `loss` is the latest."""
        now = time.monotonic()
        if self._time is not None and now > self._time and done > self._done:
            self._images = _SMOOTHING * self._images + (done - self._done) * self._batch_size
            self._seconds = _SMOOTHING * self._seconds + now - self._time
            self.images_per_second = self._images / self._seconds
        self._time, self._done = now, done
        if self._quiet:
            return
        parts = [f"loss {loss:.4g}"] if loss is not None else []
        if self.images_per_second:
            left = math.ceil((self._total - done) * self._batch_size / self.images_per_second)
            parts += [f"{self.images_per_second:,.0f} images/s", f"{datetime.timedelta(seconds=left)} left"]
        self._show(", ".join(parts))
        if not self._bar.disable:
            return
        self._last_line = ", ".join([f"batch {done:,} of {self._total:,}", *parts])
        if now - self._printed >= self._every:
            print(self._last_line, flush=True)
            self._printed, self._last_line = now, ""
