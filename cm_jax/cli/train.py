"""`train`: a preset, with any of its settings changed, in a folder of its own."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from cm_jax.cli.overrides import parse
from cm_jax.cli.running import say, use_compilation_cache
from cm_jax.errors import InputError
from cm_jax.presets import PRESETS
from cm_jax.training.loop import train as run_training
from cm_jax.training.run.dry_run import report
from cm_jax.training.setup import prepare


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a run is kept and on which machines it runs: nothing that changes what it computes."""

    run: str = ""
    """Folder of the run. One that is there already goes on from its newest checkpoint. Default: runs/PRESET."""
    dry_run: bool = False
    """Print shapes, parameters, memory and FLOPs of a step, and stop."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""
    coordinator: str = ""
    """HOST:PORT of process 0, the same for all, where several processes train together."""
    processes: int | None = None
    """Number of processes that train together."""
    process: int | None = None
    """Number of this one, from 0."""

    def __post_init__(self) -> None:
        told = (bool(self.coordinator), self.processes is not None, self.process is not None)
        if any(told) and not all(told):
            raise InputError("Several processes need --coordinator, --processes and --process; give all three.")
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}.")
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise InputError(
                f"--process counts from 0 to one less than --processes; got {self.process} of {self.processes}."
            )


def train(prog: str, arguments: Sequence[str]) -> None:
    """Read the command line, join the other processes if there are any, and train, or say what would be done."""
    preset, settings, options = parse(PRESETS, Options(), prog, arguments)
    use_compilation_cache(options.compilation_cache)
    if options.coordinator:
        try:
            jax.distributed.initialize(options.coordinator, options.processes, options.process)
        except RuntimeError as error:
            raise InputError(f"Cannot join the processes at {options.coordinator}: {error}.") from error
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    speak = say if jax.process_index() == 0 else lambda line: None
    if options.dry_run:
        for line in report(prepare(settings)):
            speak(line)
        return
    run_training(settings, Path(options.run or f"runs/{preset}"), speak)
