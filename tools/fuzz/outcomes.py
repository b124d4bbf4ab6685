"""Classification of an input as used, refused or fault, with checks of the disk and of memory."""

import contextlib
import dataclasses
import io
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from cm_jax.errors import InputError
from tools.fuzz.payloads import CANARY

SECONDS = 60
"""Time limit of an input, generous for a busy machine."""
GIGABYTES = 1.5
"""Limit of the growth of peak memory by one input."""
_MAX_MESSAGE = 20_000

Outcome = Literal["used", "refused", "fault"]


class Reached(BaseException):
    """Raised instead of sampling, training and serving. Nothing catches it, and the input counts as used."""


class TimeLimitError(BaseException):
    """Raised by the alarm. Nothing catches it."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one input."""

    outcome: Outcome
    seconds: float
    reason: str = ""
    """For a fault: what happened and where."""
    untouched: bool = True
    """Whether the folder is unchanged."""


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file and folder below, with values that change when it is written."""
    entries = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): _mark(path) for path in entries}


def _mark(path: Path) -> Any:
    status = path.lstat()
    return None if path.is_dir() else (status.st_size, status.st_mtime_ns, status.st_ino)


def observe(use: Callable[[], Any], folder: Path, may_write: Callable[[str, Outcome], bool]) -> Result:
    """Use an input in the working folder `folder`, where only files accepted by `may_write` may change.

    `use` may raise InputError, or SystemExit as commands do.
    """
    before, memory, began = snapshot(folder), _peak(), time.perf_counter()
    reason = ""
    outcome: Outcome = "used"
    with _captured_output() as (stdout, stderr), _alarm():
        try:
            use()
        except InputError as error:
            outcome, reason = "refused", _wrong_message(str(error))
        except SystemExit as stopped:
            outcome, reason = ("used", "") if stopped.code in (0, None) else ("refused", _wrong_exit(stopped, stderr))
        except Reached:
            pass
        except TimeLimitError:
            reason = f"it took more than {SECONDS} seconds:\n{_where()}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            reason = f"{type(error).__name__}: {str(error)[:300]}\n{_where()}"
    seconds = time.perf_counter() - began
    text = stdout.getvalue() + stderr.getvalue()
    if not reason and "Traceback" in text:
        reason = f"a traceback was printed:\n{text[-1500:]}"
    if (folder / CANARY).exists():
        reason = f"code in the file was executed. {reason}"
    after = snapshot(folder)
    changed = sorted(name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0))
    wrong = [name for name in changed if not may_write(name, outcome)]
    if not reason and wrong:
        reason = f"{outcome}, and on the disk this was written, changed or removed: {', '.join(wrong)[:500]}"
    if not reason and _peak() - memory > GIGABYTES * 2**30:
        reason = f"it took {(_peak() - memory) / 2**30:.1f} GiB of memory"
    return Result("fault" if reason else outcome, seconds, reason, not changed)


def _wrong_message(text: str) -> str:
    """The fault of a message, or an empty string."""
    if not text.strip() or "Traceback" in text or len(text) > _MAX_MESSAGE:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    return ""


def _wrong_exit(stopped: SystemExit, stderr: io.StringIO) -> str:
    text = stderr.getvalue()
    if stopped.code != 2 or not ("error: " in text or "For full helptext" in text):
        return f"exit status {stopped.code!r} with {text[-300:]!r}"
    strange = sorted({character for character in text if character != "\n" and not character.isprintable()})
    return f"characters that control a terminal in the message: {strange[:9]}" if strange else _wrong_message(text)


def _where() -> str:
    lines = traceback.format_exc().strip().splitlines()
    return "\n".join(lines[-14:])


def _peak() -> int:
    """Peak memory of the process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _captured_output() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Standard output and error as text, log messages included; warnings are ignored."""
    stdout, stderr = io.StringIO(), io.StringIO()
    root, handler = logging.getLogger(), logging.StreamHandler(stderr)
    old, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                yield stdout, stderr
            finally:
                root.handlers[:] = old
                root.setLevel(level)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise TimeLimitError

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """With `folder` as the working folder."""
    old = os.getcwd()
    os.chdir(folder)
    sys.stdout.flush()
    try:
        yield
    finally:
        os.chdir(old)
