"""Post-hoc EMA of a run (EDM2, section 3.2): power-function EMAs of any width, from stored snapshots of others.

RUN/ema_snapshots/00001000.npz   the power-function EMAs after 1000 batches, written with --ema-snapshot-every

The training states of the kept checkpoints are snapshots, too.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.power_profiles import WIDTHS, Combination, Profile, combine
from cm_jax.checkpoints.state_archive import STATE, StateArchive, emas, parameter_names
from cm_jax.errors import InputError
from cm_jax.types import Params, nested

SNAPSHOTS = "ema_snapshots"
GOOD_RESIDUAL = 0.05
"""Largest relative residual of a profile without a warning."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A power-function EMA after some batches."""

    batches: int
    profile: Profile
    file: Path
    place: str
    """Beginning of the names of its arrays in the file."""


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A power-function EMA that was computed from snapshots of others."""

    config: ModelConfig
    params: Params
    """NumPy arrays, float32."""
    combination: Combination
    notes: tuple[str, ...]
    """How it was computed, with the relative residual of its profile, and a warning if that is large."""


def snapshots(checkpoint: Path) -> list[Snapshot]:
    """The power-function EMAs in a checkpoint's training state and, if it is in a run's folder, in those of the run.

    In the order of batches and widths. Runs of progressive distillation have none, because each stage restarts their
    EMAs. Raises InputError for a damaged file.
    """
    found = {each.profile: each for file in _files(checkpoint) for each in _power_emas(file)}
    return sorted(found.values(), key=lambda each: (each.batches, each.profile.width))


def can_reconstruct(checkpoint: Path) -> bool:
    """Whether power-function EMAs of further widths can be reconstructed for a checkpoint. Raises as `snapshots`."""
    return _suffice(_until(snapshots(checkpoint), _batches(checkpoint)))


def reconstruct(checkpoint: Path, width: float, at: int | None = None) -> Reconstruction:
    """The power-function EMA of relative width `width` after `at` batches, by default those of the checkpoint.

    checkpoint: of a run, as `resolve` returns. The EMA is the combination of all snapshots until then whose profile is
    nearest. Raises InputError for snapshots of fewer than two widths, for `at` without one, and for a width out of
    range.
    """
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        raise InputError(f"Expected a relative width in [{WIDTHS[0]}, {WIDTHS[1]:.3f}], got {width}.")
    last, every = _batches(checkpoint) if at is None else at, snapshots(checkpoint)
    used = _until(every, last)
    if not _suffice(used):
        listed = ", ".join(f"{batches:,}" for batches in sorted({each.batches for each in every})) or "none"
        raise InputError(
            f"power_{width} needs snapshots of power-function EMAs of two widths, the last of them after {last:,} "
            f"batches. {_run(checkpoint) or checkpoint} has some after these numbers of batches: {listed}. Train with "
            "--power-ema 0.05 0.1 --ema-snapshot-every N."
        )
    target = Profile(used[-1].profile.steps, width)
    combination = combine([each.profile for each in used], target)
    config = _config(checkpoint, last)
    params = _combined(used, combination.weights, config)
    return Reconstruction(config, params, combination, tuple(_notes(used, target, combination)))


def _until(every: list[Snapshot], batches: int) -> list[Snapshot]:
    """The snapshots until then; none if there is none after exactly these batches."""
    used = [each for each in every if each.batches <= batches]
    return used if used and used[-1].batches == batches else []


def _suffice(used: list[Snapshot]) -> bool:
    return len({each.profile.width for each in used}) >= 2


def _combined(used: list[Snapshot], weights: tuple[float, ...], config: ModelConfig) -> Params:
    """The weighted sum, array by array, in float64."""
    with contextlib.ExitStack() as stack:
        archives = {file: stack.enter_context(StateArchive(file)) for file in {each.file: None for each in used}}
        names = [parameter_names(archives[each.file], each.place, config) for each in used]

        def total(name: str) -> np.ndarray:
            pairs = zip(used, weights, strict=True)
            terms = (weight * archives[each.file].read(each.place + name).astype(np.float64) for each, weight in pairs)
            return np.asarray(sum(terms), np.float32)

        return nested({name: total(name) for name in names[0]})


def _notes(used: list[Snapshot], target: Profile, combination: Combination) -> Iterator[str]:
    widths = ", ".join(f"power_{width}" for width in sorted({each.profile.width for each in used}))
    times = sorted({each.batches for each in used})
    yield (
        f"Weights: EMA power_{target.width}, reconstructed after {times[-1]:,} batches from {widths} at {len(times)} "
        f"times; relative residual of its profile {combination.residual:.2%}."
    )
    if combination.residual > GOOD_RESIDUAL:
        profiles = [each.profile for each in used]
        tried = [float(width) for width in np.geomspace(0.005, WIDTHS[1], 60)]
        good = [w for w in tried if combine(profiles, Profile(target.steps, w)).residual <= GOOD_RESIDUAL]
        expressed = f"express widths between {good[0]:.3f} and {good[-1]:.3f}" if good else "express no other width"
        yield (
            f"Warning: the residual is above {GOOD_RESIDUAL:.0%}, so this EMA has another width than {target.width}. "
            f"The snapshots {expressed}; more of them (--ema-snapshot-every) express more."
        )


def _run(checkpoint: Path) -> Path | None:
    """The run that a checkpoint is in."""
    run = checkpoint.absolute().parent.parent
    return run if checkpoint.absolute() in native.run_checkpoints(run).values() else None


def _files(checkpoint: Path) -> Iterator[Path]:
    """The files with EMAs: of snapshots, of the run's checkpoints, or of this checkpoint alone."""
    run = _run(checkpoint)
    states = [checkpoint] if run is None else native.run_checkpoints(run).values()
    files = [] if run is None else sorted((run / SNAPSHOTS).glob("[0-9]*.npz"))
    yield from (*files, *(path / STATE for path in states if (path / STATE).is_file()))


def _power_emas(file: Path) -> Iterator[Snapshot]:
    with StateArchive(file) as archive:
        batches, skipped = (int(archive.read(name)) for name in ("batches", "skipped"))
        restarts = any(name.startswith("teacher/") for name in archive.leaves)  # progressive distillation
        for name, place in emas(archive).items():
            if name.kind == "power" and batches > skipped and not restarts:
                yield Snapshot(batches, Profile(batches - skipped, name.value), file, place)


def _batches(checkpoint: Path) -> int:
    """Raises InputError for a checkpoint without a training state."""
    if not (checkpoint / STATE).is_file():
        raise InputError(f"Expected a training run or one of its checkpoints, got {checkpoint}, without {STATE}.")
    with StateArchive(checkpoint / STATE) as archive:
        return int(archive.read("batches"))


def _config(checkpoint: Path, batches: int) -> ModelConfig:
    """The config of the run's checkpoint after these batches, or of this one."""
    run = _run(checkpoint)
    found = checkpoint if run is None else native.run_checkpoints(run).get(batches, checkpoint)
    return native.read_config(found)
