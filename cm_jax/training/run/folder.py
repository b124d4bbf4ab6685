"""A run's folder and its checkpoints.

RUN/.lock                           held by the process that trains in the folder
RUN/best.json                       the checkpoint with the best evaluation
RUN/ema_snapshots/00001000.npz      the power-function EMAs after 1000 batches, kept for `post_hoc_ema`
RUN/checkpoints/00001000/           after 1000 batches:
    config.json, params/            a native checkpoint: the weights to sample from
    state/state.npz                 the training state
    state/unlogged.npz              metrics of the batches after the last row of metrics.csv

A checkpoint is written to a temporary folder, synced to disk, and renamed. So every visible checkpoint is complete,
even if the process is killed, the disk is full or the power fails.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.post_hoc_ema import SNAPSHOTS
from cm_jax.checkpoints.state_archive import STATE
from cm_jax.errors import DamagedError, InputError, check_int
from cm_jax.io.atomic import UNFINISHED, atomic_write, fsync_path, fsync_tree, remove, user_path, write_errors
from cm_jax.parallelism.processes import from_first, raised_in_all
from cm_jax.training.run import state_io
from cm_jax.training.run.lock import lock
from cm_jax.training.run.state_io import Leaves
from cm_jax.types import Params

_REPLACED = UNFINISHED + "replaced-"
_UNLOGGED = STATE.with_name("unlogged.npz")
_SETTINGS = ("config.json", "config_history.json", "run.json")
"""Files that a start changes before the first batch."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Checkpoints to keep when a new one is saved, besides the new one and the best one."""

    keep_last: int = 3
    """Number of latest checkpoints."""
    keep_every: int = 0
    """All checkpoints at multiples of this number of batches. 0: none."""
    keep_hours: float = 0.0
    """One checkpoint per this number of hours. 0: none."""

    def __post_init__(self) -> None:
        check_int("keep_last", self.keep_last, 1, 10**6)
        check_int("keep_every", self.keep_every, 0, 10**12)
        if not 0 <= self.keep_hours < 10**6:
            raise InputError(f"Expected keep_hours in [0, 1e6), got {self.keep_hours}.")

    def to_remove(self, saved: dict[int, float], newest: int, best: int | None) -> list[int]:
        """Checkpoints to remove after saving `newest`, of those in `saved` {batches: time of writing in seconds}.

        Those after `newest` stay: the run was resumed from an earlier checkpoint and will replace them.
        """
        older = sorted(batches for batches in saved if batches <= newest)
        kept = {newest, best, *older[-self.keep_last :]}
        kept.update(batches for batches in older if self.keep_every and batches % self.keep_every == 0)
        last = float("-inf")
        for batches in older:
            if self.keep_hours and saved[batches] - last >= self.keep_hours * 3600:
                kept.add(batches)
                last = saved[batches]
        return [batches for batches in older if batches not in kept]


class RunFolder(contextlib.AbstractContextManager["RunFolder"]):
    """The folder of one run, opened for training.

    With several processes (jax.distributed), all open it and call its methods together. Process 0 alone writes, so the
    folder must be shared. An error in one process is raised in all.

    Opening raises InputError if another process trains in the folder or it cannot be written. A start that fails leaves
    the folder as it was: an exception before `started` is set removes what is new in it, and restores its settings.
    """

    started = False
    """Whether a batch was trained, or a checkpoint saved."""
    unlogged: Mapping[str, np.ndarray] = {}
    """Metrics that were saved with the restored state."""

    def __init__(self, path: str | Path, retention: Retention | None = None) -> None:
        self.path = user_path(path).absolute()
        self.retention = retention or Retention()
        self._saved: set[int] = set()
        self._written: Future[None] | None = None
        self._resources = contextlib.ExitStack()
        self._former = None if not self.path.is_dir() else {entry.name for entry in self.path.iterdir()}
        self._missing = [folder for folder in self.path.parents if not folder.exists()]
        self._settings: dict[str, bytes] = {}
        with raised_in_all():
            if jax.process_index() == 0:
                self._resources.callback(os.close, lock(self.path))
                self._clean_up()
                files = (self.path / name for name in _SETTINGS)
                self._settings = {file.name: file.read_bytes() for file in files if file.is_file()}
        self._writer = self._resources.enter_context(ThreadPoolExecutor(1, "checkpoints"))

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._written is not None and (failure := self._written.exception()) is not None:
            _log.warning("%s", failure)  # not raised: the other processes may not have this error
        if kind is not None and not self.started and jax.process_index() == 0:
            self._restore()  # while the folder is locked
        self._resources.close()

    def _restore(self) -> None:
        """Restore the settings, and remove what is new in the folder, and the folder itself if it is new."""
        for name, content in self._settings.items():
            with atomic_write(self.path / name) as fresh:
                fresh.write_bytes(content)
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.name not in (self._former or ()):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in [*([self.path] if self._former is None else []), *self._missing]:
                folder.rmdir()

    def save(
        self,
        batches: int,
        config: ModelConfig,
        params: Params,
        state: Any,
        unlogged: Mapping[str, np.ndarray] = {},
        *,
        snapshot: bool = False,
    ) -> None:
        """Save a checkpoint after `batches`: `params` to sample from, and `state`, any tree of arrays.

        unlogged: metrics by batch that the log needs on resuming. snapshot: also write the power-function EMAs of the
        state to RUN/ema_snapshots.

        Returns once all arrays are on the host; a thread writes them. The next call waits for it, and raises InputError
        if it failed.
        """
        self.wait()
        if batches in self._saved:
            return
        writes = jax.process_index() == 0
        host_params, host_state = state_io.to_host((params, state), needed=writes)
        self._saved.add(batches)
        self.started = True
        if writes:
            leaves, metrics = state_io.named_arrays(state, host_state), state_io.named_arrays(unlogged, unlogged)
            self._written = self._writer.submit(self._write, batches, config, host_params, leaves, metrics, snapshot)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises InputError if that failed."""
        try:
            with raised_in_all():
                written, self._written = self._written, None
                if written is not None:
                    written.result()
        except InputError:
            self._saved.clear()
            raise

    def close(self) -> None:
        """Wait, and unlock the folder."""
        with self._resources:
            self.wait()

    def mark_best(self, batches: int, score: float, details: Mapping[str, Any] = {}) -> None:
        """Mark a checkpoint as the best so far in best.json. It is kept until another one is marked."""
        self.wait()
        with raised_in_all():
            if jax.process_index() == 0:
                if batches not in self.steps():
                    raise InputError(f"{self.path} has no checkpoint after {batches} batches to mark as the best.")
                with atomic_write(self.path / "best.json") as file:
                    file.write_text(json.dumps({"batches": batches, "score": float(score), **details}) + "\n", "utf-8")

    def steps(self) -> list[int]:
        """Numbers of batches of the checkpoints, ascending."""
        return [batches for batches, path in native.run_checkpoints(self.path).items() if (path / STATE).is_file()]

    def latest(self) -> int | None:
        """Number of batches of the latest checkpoint, if there is one."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Number of batches of the best checkpoint, if one is marked."""
        return native.best_checkpoint(self.path)

    def restore(self, batches: int, template: Any) -> Any:
        """The state after `batches`, with the structure and the placement of `template`.

        It is bitwise identical to the saved one on any devices. Raises InputError if the checkpoint is missing or
        damaged, or differs from the template.
        """
        with raised_in_all():
            if batches not in self.steps():
                found = ", ".join(map(str, self.steps())) or "none"
                raise InputError(f"{self.path} has no checkpoint after {batches} batches; it has {found}.")
            state = state_io.read(self._checkpoint(batches) / STATE, template)
            self.unlogged = state_io.read_arrays(self._checkpoint(batches) / _UNLOGGED)
        self._saved.add(batches)
        return state

    def resume(self, template: Any) -> tuple[int, Any] | None:
        """(batches, state) of the latest readable checkpoint; None if the run has no checkpoint.

        template: as of `restore`, or a function that returns it for a number of batches.
        Damaged checkpoints are skipped with a warning. Raises InputError if all are damaged or one differs from the
        template.
        """
        damaged: list[DamagedError] = []
        candidates = self.steps()
        while (batches := from_first(candidates.pop() if candidates else -1)) >= 0:
            try:
                state = self.restore(batches, template(batches) if callable(template) else template)
            except DamagedError as error:
                damaged.append(error)
                continue
            for error in damaged:
                _log.warning("%s Resuming from the checkpoint after %d batches.", error, batches)
            return batches, state
        if damaged:
            raise InputError(f"All checkpoints in {self.path} are damaged: {damaged[0]} Start in a new folder.")
        return None

    def _clean_up(self) -> None:
        """After a killed process: put a checkpoint that was being replaced back, and remove temporary files."""
        for left in (self.path / "checkpoints").glob(f"{_REPLACED}*"):
            original = left.with_name(left.name.removeprefix(_REPLACED))
            if not original.exists():
                os.replace(left, original)
        for left in (*self.path.glob(f"{UNFINISHED}*"), *self.path.glob(f"*/{UNFINISHED}*")):
            shutil.rmtree(left, ignore_errors=True)

    def _checkpoint(self, batches: int) -> Path:
        return self.path / "checkpoints" / f"{batches:08d}"

    def _write(
        self, batches: int, config: ModelConfig, params: Params, leaves: Leaves, metrics: Leaves, snapshot: bool
    ) -> None:
        """In the thread: write, rename, and remove old checkpoints."""
        place = self._checkpoint(batches)
        fresh, replaced = place.with_name(f"{UNFINISHED}{place.name}"), place.with_name(f"{_REPLACED}{place.name}")
        try:
            with write_errors(place):
                if snapshot:  # first, because a run that resumes from the checkpoint does not come back to it
                    self._write_snapshot(batches, leaves)
                native.save(fresh, config, params)
                (fresh / STATE.parent).mkdir()
                state_io.write(fresh / STATE, leaves)
                if metrics:
                    state_io.write(fresh / _UNLOGGED, metrics)
                fsync_tree(fresh)
                if place.exists():  # damaged, or the run was resumed from an earlier one
                    os.replace(place, replaced)
                os.replace(fresh, place)
                fsync_path(place.parent)
                shutil.rmtree(replaced, ignore_errors=True)
        except InputError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            last = max((step for step in self.steps() if step < batches), default=None)
            kept = "There is no earlier one." if last is None else f"The one after {last} batches is kept."
            raise InputError(f"The checkpoint after {batches} batches could not be saved: {error} {kept}") from error
        try:
            times = {step: (self._checkpoint(step) / "config.json").stat().st_mtime for step in self.steps()}
            for step in self.retention.to_remove(times, batches, self.best()):
                remove(self._checkpoint(step))
        except (InputError, OSError) as error:
            _log.warning("Old checkpoints in %s were not removed: %s", self.path, error)

    def _write_snapshot(self, batches: int, leaves: Leaves) -> None:
        parts = {name: leaf for name, leaf in leaves.items() if name.startswith(("batches", "skipped", "ema/power_"))}
        with atomic_write(self.path / SNAPSHOTS / f"{batches:08d}.npz") as file:
            state_io.write(file, parts)
            fsync_path(file)
        fsync_path(self.path / SNAPSHOTS)
