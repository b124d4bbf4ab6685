"""What the commands share while they run: exits, messages, progress, and compiled programs that are kept."""

import atexit
import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

from cm_jax import kernels
from cm_jax.errors import InputError

_LONGEST_LINE = 2000
"""Of a message."""


def run(command: Callable[[], None]) -> NoReturn:
    """Exit with 0; or, for bad input, with 2 and one message; or with 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal lacks
    kernels.keep_memory()
    # Python looks for garbage after every 700 new objects, and once more at its end: a fifth of a short command's time.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    try:
        command()
    except InputError as error:
        print(f"error: {_visible(_shortened(str(error)))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing is half-written.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def say(line: str) -> None:
    print(_visible(line), flush=True)


def _shortened(text: str) -> str:
    """The text without the rest of lines that a whole file or command line was put into."""
    lines = text.split("\n")
    return "\n".join(line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ..." for line in lines)


def _visible(text: str) -> str:
    """The text without characters that would command a terminal: names in others' files and of files may have some."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def devices() -> str:
    found = jax.local_devices()
    return f"{len(found)} x {found[0].device_kind}"


def progress(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The batches, with a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=count)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))


@contextlib.contextmanager
def compilation_time() -> Iterator[Callable[[], float]]:
    """A function that tells how many seconds went into tracing and compiling inside the block."""
    spent: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: sum(spent)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs between runs, unless JAX was already told where, or the user wants none."""
    if folder == "off" or (not folder and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder else home / "cm_jax" / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise InputError(f"Cannot keep compiled programs in {path}: {error.strerror}.") from error
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
