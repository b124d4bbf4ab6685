"""`train`: train a preset, with any field overridden, in a run folder."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from cm_jax.cli.distributed import Distributed
from cm_jax.cli.options import Compilation
from cm_jax.cli.parsing import parse_preset
from cm_jax.cli.running import say, use_compilation_cache
from cm_jax.presets import PRESETS
from cm_jax.progress import listening, silent
from cm_jax.training.config import TrainConfig
from cm_jax.training.initial_weights import RUNTIME_FIELDS
from cm_jax.training.loop import train
from cm_jax.training.run.dry_run import dry_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Distributed, Compilation):
    """Options of the process, which do not change the results of the run."""

    run: str = ""
    """Folder of the run. Training resumes from its latest checkpoint if there is one. Default: runs/PRESET."""
    allow_config_change: bool = False
    """Resume with other settings than those in the folder, such as batch size, learning rate or EMAs. The change is
    recorded in config_history.json."""
    dry_run: bool = False
    """Print shapes, parameters, memory and FLOPs per step, and exit."""


def inheriting(settings: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """The settings, which take from the initial checkpoint what the command line does not set of network and data."""
    flags = (word.partition("=")[0][2:] for word in words if word.startswith("--"))
    given = [flag.replace("-", "_").split(".") for flag in flags]
    heads = {path[0].removeprefix("no_") for path in given}
    if not settings.initial_checkpoint:
        return settings
    network = settings.inherit_network if "inherit_network" in heads else ["network"] not in given
    data = settings.inherit_data if "inherit_data" in heads else "data" not in heads
    own = {path[1].removeprefix("no_") for path in given if path[0] == "network" and len(path) > 1}
    fields = {*settings.network_fields, *own.difference(RUNTIME_FIELDS)} if network else ()
    return dataclasses.replace(
        settings, inherit_network=network, inherit_data=data, network_fields=tuple(sorted(fields))
    )


def main(prog: str, words: Sequence[str]) -> None:
    """Read the command line, connect the processes, and train or print the dry run."""
    preset, settings, options = parse_preset(PRESETS, Options(), prog, words)
    settings = inheriting(settings, words)
    use_compilation_cache(options.compilation_cache)
    options.connect()
    with listening(silent) if jax.process_index() else contextlib.nullcontext():
        if options.dry_run:
            for line in dry_run(settings, PRESETS[preset]()):
                say(line)
        else:
            folder = Path(options.run or f"runs/{preset}")
            train(settings, folder, say, allow_config_change=options.allow_config_change)
