"""Progress of work that takes seconds: what is being done, and how much of it is done.

    with activity("Compiling the training step", "usually 10 to 60 s"):
        ...
    for batch in counted(batches, count, "Sampling"):
        ...

Activities of more than a second are messages at level INFO of the logger `cm_jax`, one at the start and one every 30 s.
Commands print these on standard error; on a terminal they show a live line instead (`on_terminal`). In Python, they are
silent unless the program configures logging.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("cm_jax.progress")

DELAY = 1.0
"""Seconds after which an activity is shown; shorter ones are not."""
EVERY = 30.0
"""Seconds between messages about an activity."""

Rows = TypeVar("Rows", bound=Sized)


@dataclasses.dataclass(eq=False)
class Activity:
    """Work in progress. As a string: "Sampling: 320 of 10,000 images"."""

    what: str
    """What is being done: "Sampling"."""
    note: str = ""
    """How long it usually takes, and the like."""
    total: float = 0
    """Units of the whole work; 0 if unknown."""
    unit: str = "images"
    own_bar: bool = False
    """Whether the work shows a bar of its own on a terminal, as huggingface_hub does."""
    done: float = 0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def advance(self, count: float = 1) -> None:
        """Count finished units."""
        self.done += count

    def __str__(self) -> str:
        counts = f": {self.done:,.0f} of {self.total:,.0f} {self.unit}" if self.total else ""
        return self.what + (f" ({self.note})" if self.note else "") + counts

    @property
    def times(self) -> str:
        """The time so far, and an estimate of the rest if units are counted."""
        spent = time.monotonic() - self.began
        shown = f", {datetime.timedelta(seconds=int(spent))} so far"
        if 0 < self.done < self.total:
            left = datetime.timedelta(seconds=int(spent * (self.total - self.done) / self.done))
            shown += f", about {left} left"
        return shown


Listener = Callable[[Activity], contextlib.AbstractContextManager[None]]
"""Entered when an activity begins, left when it ends."""
Show = Callable[[Activity, threading.Event], None]
"""Shows an activity until the event is set, in a thread of its own."""

_running: list[Activity] = []
"""The innermost last."""


@contextlib.contextmanager
def activity(
    what: str, note: str = "", *, total: float = 0, unit: str = "images", own_bar: bool = False
) -> Iterator[Activity]:
    """Announce the work of the block, which may call `advance` of the activity. Arguments: see Activity."""
    new = Activity(what, note, total, unit, own_bar)
    _running.append(new)
    try:
        with _listener(new):
            yield new
    finally:
        _running.remove(new)


def counted(batches: Iterable[Rows], total: int, what: str, note: str = "", unit: str = "images") -> Iterator[Rows]:
    """The same batches, during an activity that counts their rows."""
    with activity(what, note, total=total, unit=unit) as shown:
        for batch in batches:
            shown.advance(len(batch))
            yield batch


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[Listener]:
    """Show activities with another listener; the block receives the one before."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield before
    finally:
        _listener = before


@contextlib.contextmanager
def silent(activity: Activity) -> Iterator[None]:
    """A listener that shows nothing."""
    yield


def logged(activity: Activity) -> contextlib.AbstractContextManager[None]:
    """A listener that logs messages."""
    return delayed(_log)(activity) if log.isEnabledFor(logging.INFO) else silent(activity)


_listener: Listener = logged


def delayed(show: Show) -> Listener:
    """A listener that shows activities that are older than DELAY."""

    @contextlib.contextmanager
    def listener(activity: Activity) -> Iterator[None]:
        ended = threading.Event()
        thread = threading.Thread(target=lambda: ended.wait(DELAY) or show(activity, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    return listener


def _log(activity: Activity, ended: threading.Event) -> None:
    log.info("%s ...", activity)
    while not ended.wait(EVERY):
        if _running[-1:] == [activity]:  # not an outer one
            log.info("%s%s.", activity, activity.times)


def terminal() -> "Console | None":
    """The terminal of standard error or the notebook; None for a file, a pipe, or a terminal with a fixed cursor.

    Also None for a notebook without ipywidgets, where rich would show a warning in place of the progress.
    """
    kernel = sys.modules.get("ipykernel.kernelapp")
    notebook = kernel is not None and kernel.IPKernelApp.initialized()
    if notebook and importlib.util.find_spec("ipywidgets") is None:
        return None
    if not (sys.stderr.isatty() or notebook):
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if notebook or not console.is_dumb_terminal else None


@contextlib.contextmanager
def on_terminal() -> Iterator[None]:
    """Show activities on the terminal or in the notebook, if there is one."""
    console = terminal()
    with listening(_live(console)) if console else contextlib.nullcontext():
        yield


def _live(console: "Console") -> Listener:
    """A listener that shows the innermost activity in one live line."""
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def row() -> Table:
        table, now = Table.grid(padding=(0, 1)), time.monotonic()
        old = [each for each in _running if now - each.began >= DELAY and not each.own_bar]
        if old:
            bar = ProgressBar(old[-1].total or None, old[-1].done, width=20, pulse=not old[-1].total)
            table.add_row(bar, Text(f"{old[-1]}{old[-1].times}", no_wrap=True, overflow="ellipsis"))
        return table

    shown = threading.Lock()

    def show(activity: Activity, ended: threading.Event) -> None:
        if activity.own_bar or not shown.acquire(blocking=False):
            return  # the live line of an outer activity shows the innermost
        to_terminal = sys.stdout.isatty()  # a file keeps its lines
        try:
            with Live(get_renderable=row, console=console, transient=True, redirect_stdout=to_terminal):
                console.show_cursor(True)  # a killed command would leave the terminal without it
                ended.wait()
        finally:
            shown.release()

    return delayed(show)
