"""Shared by all commands: exit codes, messages, the compilation cache."""

import atexit
import contextlib
import gc
import io
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

import jax

from cm_jax import kernels, progress
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_cache, user_path
from cm_jax.parallelism import Parallelism

_LONGEST_LINE = 2000
"""Characters per line of a message."""
_MEMORY_ADVICE = (
    "Reduce --batch-size, or compute in --precision bfloat16. In training: --grad-accum-steps 2 or more, "
    "--network.rematerialize, or --network.precision bfloat16."
)


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0; 2 and one message for bad input; 130 if interrupted; 141 for a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file and class names may not fit the terminal's encoding
    logging.basicConfig(format="%(message)s", handlers=[_Messages()])
    logging.getLogger("cm_jax").setLevel(logging.INFO)
    kernels.keep_memory()
    # Fewer garbage collections: with Python's defaults they take 20 % of a short command's time.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    try:
        status = _status(command)
    except BrokenPipeError:
        if not (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
            raise
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes both once more when it exits
        status = 141
    sys.exit(status)


def _status(command: Callable[[], None]) -> int:
    """Exit status of a command. Raises BrokenPipeError if its output or its message meets a closed pipe."""
    try:
        try:
            with progress.on_terminal():
                command()
        finally:
            sys.stdout.flush()
    except InputError as error:
        lines = str(error).split("\n")  # a line may quote a whole file
        short = [line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ..." for line in lines]
        print("error: " + _visible("\n".join(short)), file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = (str(error).strip().splitlines() or ["no details"])[0][:300]
        print(f"error: Out of memory ({_visible(first)}). {_MEMORY_ADVICE}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Output files are complete or absent.", file=sys.stderr)
        return 130
    return 0


def _is_closed(stream: TextIO) -> bool:
    """Whether the reader of a pipe has ended, as in `... | head`."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class _Messages(logging.Handler):
    """Log messages on standard error, above the live line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a closed pipe does not end the command
            print(_visible(self.format(record)), file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line, of several processes in the first alone."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(_visible(line), flush=True)


def _visible(text: str) -> str:
    """The text with control characters escaped, which names in files may contain."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def described(parallelism: Parallelism) -> str:
    """The devices of a command."""
    found, processes = parallelism.devices, jax.process_count()
    each = f"{len(found)} x {found[0].device_kind}"
    return each if processes == 1 else f"{each} in each of {processes} processes"


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], str]]:
    """A function that returns the time since the block was entered, and its share of tracing and compilation."""
    began = time.perf_counter()
    spent: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: f"{time.perf_counter() - began:.1f} s (compilation: {sum(spent):.1f} s)"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs between runs in `folder` ("" for the default, "off" for none). JAX's own setting wins."""
    if folder == "off" or (not folder and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    path = user_path(folder or user_cache("compiled"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise InputError(f"Cannot write the compilation cache {path}: {error.strerror}.") from error
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
