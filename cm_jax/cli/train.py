"""`train`: train a preset, with any field overridden, in a run folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from cm_jax.cli.options import Compilation
from cm_jax.cli.parsing import parse_preset
from cm_jax.cli.running import say, use_compilation_cache
from cm_jax.errors import InputError
from cm_jax.presets import PRESETS
from cm_jax.training.loop import train
from cm_jax.training.run.dry_run import report
from cm_jax.training.setup import prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Compilation):
    """Options of the process, which do not change the results of the run."""

    run: str = ""
    """Folder of the run. Training resumes from its latest checkpoint if there is one. Default: runs/PRESET."""
    dry_run: bool = False
    """Print shapes, parameters, memory and FLOPs per step, and exit."""
    coordinator: str = ""
    """HOST:PORT of process 0, for multi-process training. Default: a single process."""
    processes: int | None = None
    """Number of processes. Default: a single process."""
    process: int | None = None
    """Index of this process, from 0. Default: a single process."""

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.processes is not None, self.process is not None)
        if any(given) and not all(given):
            raise InputError("Multi-process training needs all of --coordinator, --processes and --process.")
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}.")
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise InputError(f"--process must lie in [0, {self.processes - 1}], got {self.process}.")


def main(prog: str, words: Sequence[str]) -> None:
    """Read the command line, connect to the other processes if there are any, and train or print the dry run."""
    preset, settings, options = parse_preset(PRESETS, Options(), prog, words)
    use_compilation_cache(options.compilation_cache)
    if options.coordinator:
        try:
            jax.distributed.initialize(options.coordinator, options.processes, options.process)
        except RuntimeError as error:
            raise InputError(f"Cannot connect to the coordinator at {options.coordinator}: {error}.") from error
    speak = say if jax.process_index() == 0 else lambda line: None
    if options.dry_run:
        for line in report(prepare(settings)):
            speak(line)
    else:
        train(settings, Path(options.run or f"runs/{preset}"), speak)
