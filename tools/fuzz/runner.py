"""The fuzzing loop: inputs of all targets until the time is over."""

import contextlib
import dataclasses
import functools
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from cm_jax.networks.unet import UNet
from tools.fuzz import commands, readers, seeds
from tools.fuzz.outcomes import Result, observe, working_directory


@dataclasses.dataclass
class Tally:
    """Outcomes of the inputs of one target."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0

    def add(self, found: Result) -> None:
        self.outcomes[found.outcome] += 1
        self.slowest = max(self.slowest, found.seconds)


def names() -> list[str]:
    """All targets: the readers, then the commands."""
    return [target.name for target in readers.READERS] + [f"cm-jax {command.name}" for command in commands.COMMANDS]


class Workspace:
    """Valid files and two working folders: one recreated for each damaged file, one for commands."""

    def __init__(self, top: Path) -> None:
        self.valid, self.work, self.pristine, self.command_folder, self.cache = (
            top / name for name in ("valid", "work", "pristine", "command_folder", "cache")
        )
        seeds.write(self.valid)
        self.pristine.mkdir()
        for name in commands.FILES:
            copy = shutil.copytree if (self.valid / name).is_dir() else shutil.copyfile
            copy(self.valid / name, self.pristine / name)
        commands.add_special_files(self.pristine)
        self.cache.mkdir()
        self._clean = False

    def attempt(self, name: str, seed: int, number: int) -> tuple[Result, str]:
        """Try input `number` of a target. Returns the outcome and a description of the input."""
        rng = random.Random(f"{seed} {name} {number}")
        command = next((each for each in commands.COMMANDS if name == f"cm-jax {each.name}"), None)
        if command is not None:
            return self.run_command_line(command.line(rng))
        target = next(target for target in readers.READERS if target.name == name)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        target.prepare(self.valid, self.work, rng)
        with working_directory(self.work):
            return observe(lambda: target.use(self.work, rng), self.work, target.may_write), name

    def run_command_line(self, words: Sequence[str]) -> tuple[Result, str]:
        """Try a command line."""
        if not self._clean:
            shutil.rmtree(self.command_folder, ignore_errors=True)
            shutil.copytree(self.pristine, self.command_folder, symlinks=True)
        with working_directory(self.command_folder), commands.without_work(self.cache):
            found = observe(lambda: commands.run_command(words), self.command_folder, self._may_write)
        self._clean = found.untouched
        return found, "cm-jax " + " ".join(map(repr, words))[:2000]

    def _may_write(self, name: str, outcome: str) -> bool:
        """A successful command writes new files; `convert` also replaces .pt and .safetensors files."""
        there = (self.pristine / Path(name).parts[0]).exists()
        return outcome == "used" and (not there or name.endswith((".pt", ".safetensors")))


@contextlib.contextmanager
def temporary_workspace() -> Iterator[Workspace]:
    shapes = functools.lru_cache(maxsize=64)(UNet.shapes)  # for a few networks, many times
    with tempfile.TemporaryDirectory(prefix="cm_jax-fuzz-") as folder, mock.patch.object(UNet, "shapes", shapes):
        yield Workspace(Path(folder).resolve())


def run(
    workspace: Workspace,
    targets: Sequence[str],
    seed: int,
    *,
    seconds: float = float("inf"),
    each: int | None = None,
    first: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Tally]:
    """Try inputs `first`, `first` + 1, ... of every target for `seconds`, or `each` inputs per target.

    Each command gets three times as much time as each reader.
    """
    end = time.monotonic() + seconds
    tallies = {name: Tally() for name in targets}
    spent, number = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, first)
    while time.monotonic() < end:
        waiting = [name for name in targets if each is None or number[name] < first + each]
        if not waiting:
            break
        name = min(waiting, key=lambda name: spent[name] / (3 if name.startswith("cm-jax ") else 1))
        began = time.perf_counter()
        found, words = workspace.attempt(name, seed, number[name])
        spent[name] += time.perf_counter() - began
        if found.outcome == "fault":
            report(f"FAULT: --seed {seed} --targets {name!r} --number {number[name]}: {words}\n{found.reason}\n")
        tallies[name].add(found)
        number[name] += 1
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Counts as a Markdown table with one row per target."""
    rows = [("target", "inputs", "used", "refused", "faults", "slowest"), ("---", *("---:",) * 5)]
    total: Counter[str] = Counter()
    for name, tally in tallies.items():
        counts = tally.outcomes
        total += counts
        shown = (f"{counts[key]:,}" for key in ("used", "refused", "fault"))
        rows.append((name, f"{counts.total():,}", *shown, f"{tally.slowest:.1f} s"))
    shown = (f"{total[key]:,}" for key in ("used", "refused", "fault"))
    rows.append(("all", f"{total.total():,}", *shown, f"{max(tally.slowest for tally in tallies.values()):.1f} s"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
