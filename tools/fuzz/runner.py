"""Tries inputs, and classifies each as used, refused or fault, with checks of the disk, of memory and of time."""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from cm_jax.errors import InputError
from cm_jax.networks.unet import UNet
from tools.fuzz import commands, seeds
from tools.fuzz.payloads import CANARY
from tools.fuzz.targets import TARGETS

SECONDS = 60
"""Time limit of an input, generous for a busy machine."""
GIGABYTES = 1.5
"""Limit of the growth of peak memory by one input."""
LONGEST_MESSAGE = 20_000

Outcome = Literal["used", "refused", "fault"]
NAMES = (*TARGETS, *(f"cm-jax {name}" for name in commands.LINES))


class TimeLimitError(BaseException):
    """Raised by the alarm. Nothing catches it."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one input; for a fault, what happened and where."""

    outcome: Outcome
    reason: str = ""
    untouched: bool = True
    """Whether the folder is unchanged."""


def observe(use: Callable[[], Any], folder: Path, may_write: Callable[[str, Outcome], bool]) -> Result:
    """Use an input in the working folder `folder`, where only files accepted by `may_write` may change.

    `use` may raise InputError, or SystemExit as commands do.
    """
    before, memory = _snapshot(folder), _peak()
    outcome: Outcome = "used"
    reason = ""
    with _captured_output() as (stdout, stderr), _alarm():
        try:
            use()
        except InputError as error:
            outcome, reason = "refused", _wrong_message(str(error))
        except SystemExit as stopped:
            outcome, reason = ("used", "") if stopped.code in (0, None) else ("refused", _wrong_exit(stopped, stderr))
        except commands.Reached:
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = "\n".join(traceback.format_exc().strip().splitlines()[-14:])
            reason = f"{type(error).__name__}: {str(error)[:300]}\n{where}"
    after = _snapshot(folder)
    changed = sorted(name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0))
    wrong = [name for name in changed if not may_write(name, outcome)]
    if (folder / CANARY).exists():
        reason = f"code in the file was executed. {reason}"
    elif not reason and "Traceback" in (text := stdout.getvalue() + stderr.getvalue()):
        reason = f"a traceback was printed:\n{text[-1500:]}"
    elif not reason and wrong:
        reason = f"{outcome}, and on the disk this was written, changed or removed: {', '.join(wrong)[:500]}"
    elif not reason and _peak() - memory > GIGABYTES * 2**30:
        reason = f"it took {(_peak() - memory) / 2**30:.1f} GiB of memory"
    return Result("fault" if reason else outcome, reason, not changed)


def _wrong_message(text: str) -> str:
    """The fault of a message, or an empty string."""
    if not text.strip() or "Traceback" in text or len(text) > LONGEST_MESSAGE:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    return ""


def _wrong_exit(stopped: SystemExit, stderr: io.StringIO) -> str:
    text = stderr.getvalue()
    if stopped.code != 2 or not ("error: " in text or "For full helptext" in text):
        return f"exit status {stopped.code!r} with {text[-300:]!r}"
    strange = sorted({character for character in text if character != "\n" and not character.isprintable()})
    return f"characters that control a terminal in the message: {strange[:9]}" if strange else _wrong_message(text)


def _snapshot(folder: Path) -> dict[str, Any]:
    """Every file and folder below, with values that change when a file is written."""

    def mark(path: Path) -> Any:
        status = path.lstat()
        return None if path.is_dir() else (status.st_size, status.st_mtime_ns, status.st_ino)

    return {str(path.relative_to(folder)): mark(path) for path in folder.rglob("*")}


def _peak() -> int:
    """Peak memory of the process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _captured_output() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Standard output and error as text, log messages included; warnings are ignored."""
    stdout, stderr = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    old, level = root.handlers[:], root.level
    root.handlers[:] = [logging.StreamHandler(stderr)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        warnings.simplefilter("ignore")
        try:
            yield stdout, stderr
        finally:
            root.handlers[:] = old
            root.setLevel(level)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise TimeLimitError(f"it took more than {SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Workspace:
    """Valid files and two working folders: one recreated for each damaged file, one for commands."""

    def __init__(self, top: Path) -> None:
        self.valid, self.work, self.pristine, self.command_folder, self.cache = (
            top / name for name in ("valid", "work", "pristine", "command_folder", "cache")
        )
        seeds.write(self.valid)
        commands.write_folder(self.valid, self.pristine)
        self.cache.mkdir()
        self._clean = False

    def attempt(self, name: str, seed: int, number: int) -> tuple[Result, str]:
        """Try input `number` of a target: the result and a description of the input."""
        rng = _random(name, seed, number)
        if name.startswith("cm-jax "):
            return self.run_command_line(commands.line(name.removeprefix("cm-jax "), rng))
        target = TARGETS[name]
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        target.prepare(self.valid, self.work, rng)
        with contextlib.chdir(self.work):
            use = functools.partial(target.read, self.work / target.file, rng)
            found = observe(use, self.work, lambda name, outcome: name == "run" or name.startswith(target.writes))
        return found, name

    def keep(self, name: str, seed: int, number: int) -> Path:
        """A new folder with the files that input `number` of a target found."""
        kept = Path(tempfile.mkdtemp(prefix="cm_jax-fuzz-fault-"))
        if name.startswith("cm-jax "):
            shutil.copytree(self.pristine, kept, symlinks=True, dirs_exist_ok=True)
        else:
            TARGETS[name].prepare(self.valid, kept, _random(name, seed, number))
        return kept

    def run_command_line(self, words: Sequence[str]) -> tuple[Result, str]:
        """Try a command line: the result and the line."""
        if not self._clean:
            shutil.rmtree(self.command_folder, ignore_errors=True)
            shutil.copytree(self.pristine, self.command_folder, symlinks=True)
        with contextlib.chdir(self.command_folder), commands.without_work(self.cache):
            found = observe(lambda: commands.run(words), self.command_folder, self._may_write)
        self._clean = found.untouched
        return found, "cm-jax " + " ".join(map(repr, words))[:2000]

    def _may_write(self, name: str, outcome: str) -> bool:
        """A successful command writes new files; `convert` also replaces .pt and .safetensors files."""
        there = (self.pristine / Path(name).parts[0]).exists()
        return outcome == "used" and (not there or name.endswith((".pt", ".safetensors")))


def _random(name: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {name} {number}")


@contextlib.contextmanager
def temporary_workspace() -> Iterator[Workspace]:
    shapes = functools.lru_cache(maxsize=64)(UNet.shapes)  # for a few networks, many times
    with tempfile.TemporaryDirectory(prefix="cm_jax-fuzz-") as folder, mock.patch.object(UNet, "shapes", shapes):
        yield Workspace(Path(os.path.realpath(folder)))


def fuzz(
    workspace: Workspace,
    targets: Sequence[str],
    seed: int,
    *,
    seconds: float = float("inf"),
    numbers: range = range(10**9),
    report: Callable[[str], None] = print,
) -> dict[str, Counter[str]]:
    """Try the inputs of these numbers of every target, for at most `seconds`; counts of outcomes by target.

    Targets take turns so that each gets the same time, and commands three times as much as readers.
    """
    end = time.monotonic() + seconds
    counts: dict[str, Counter[str]] = {name: Counter() for name in targets}
    spent, waiting = dict.fromkeys(targets, 0.0), {name: iter(numbers) for name in targets}
    while waiting and time.monotonic() < end:
        name = min(waiting, key=lambda name: spent[name] / (3 if name.startswith("cm-jax ") else 1))
        if (number := next(waiting[name], None)) is None:
            del waiting[name]
            continue
        began = time.perf_counter()
        found, words = workspace.attempt(name, seed, number)
        spent[name] += time.perf_counter() - began
        counts[name][found.outcome] += 1
        if found.outcome == "fault":
            again = f"--seed {seed} --targets {name!r} --number {number}"
            report(f"FAULT: {again}: {words}\nIts files: {workspace.keep(name, seed, number)}\n{found.reason}\n")
    return counts
