"""`reconstruct-ema`: power-function EMAs of a run with other widths than those it tracked, as checkpoints."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cm_jax.checkpoints import native
from cm_jax.checkpoints.post_hoc_ema import Reconstruction, reconstruct
from cm_jax.checkpoints.published import resolve
from cm_jax.cli.parsing import numbers, parse
from cm_jax.cli.running import say
from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write, check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructEMA:
    """Reconstruct power-function EMAs of other widths from the snapshots of a run (post-hoc EMA of EDM2).

    Runs store snapshots with --power-ema 0.05 0.1 --ema-snapshot-every N. To use one EMA without writing it, give
    --ema power_WIDTH to the other commands.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its latest checkpoint), RUN/best, or one of its checkpoints."""
    width: str
    """Relative widths of the EMAs, separated by commas: "0.03,0.07"."""
    at: int | None = None
    """Number of batches at which a snapshot or a checkpoint was stored. Default: that of the checkpoint."""
    output: Path
    """Folder for the checkpoint; for several widths, of the checkpoints power_WIDTH in it."""


def main(prog: str, words: Sequence[str]) -> None:
    """Reconstruct each EMA, and write it as a native checkpoint."""
    args = parse(ReconstructEMA, prog, words)
    widths = list(dict.fromkeys(numbers("width", args.width, float) or ()))
    if not widths:
        raise InputError("Expected relative widths, such as --width 0.03,0.07, got none.")
    check_writable(args.output, folder=True)
    checkpoint = resolve(args.run)
    if len(widths) == 1:
        found = _found(checkpoint, widths[0], args.at)
        native.save(args.output, found.config, found.params)
    else:
        with atomic_write(args.output) as beside:
            for width in widths:
                found = _found(checkpoint, width, args.at)
                native.save(beside / f"power_{width}", found.config, found.params)
    first = args.output if len(widths) == 1 else args.output / f"power_{widths[0]}"
    say(f"Wrote {args.output}. Sample from it: cm-jax sample {shlex.quote(str(first))}")


def _found(checkpoint: Path, width: float, at: int | None) -> Reconstruction:
    found = reconstruct(checkpoint, width, at)
    for note in found.notes:
        say(note)
    return found
