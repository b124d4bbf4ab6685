"""A run's folder: one process at a time trains in it, and its checkpoints survive whatever ends that process.

RUN/.lock                           who trains in it; held by the process, so that killing it frees the folder
RUN/best.json                       the checkpoint that an evaluation liked best
RUN/checkpoints/00001000/           after 1000 batches:
    config.json, params/            a checkpoint of cm_jax.checkpoints.native: the weights to draw from
    state/state.npz                 all that is needed to train on

A checkpoint is written beside its place and renamed when it and its names are on the disk. So what is visible is whole,
whether the process is killed, the disk is full or the power fails.
"""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.errors import InputError, check_int
from cm_jax.io.atomic import UNFINISHED, atomic_write, fsync_path, fsync_tree, remove, user_path, write_errors
from cm_jax.training.run import state_io
from cm_jax.training.run.state_io import DamagedError, Leaf, first_process, together
from cm_jax.types import Params

_STATE = Path("state") / "state.npz"
_REPLACED = UNFINISHED + "replaced-"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is whole; the new one and the best one always do."""

    keep_last: int = 3
    """The newest so many."""
    keep_every: int = 0
    """And for good those at multiples of so many batches. 0: none."""
    keep_hours: float = 0.0
    """And for good one for every so many hours of training. 0: none."""

    def __post_init__(self) -> None:
        check_int("keep_last", self.keep_last, 1, 10**6)
        check_int("keep_every", self.keep_every, 0, 10**12)
        if not 0 <= self.keep_hours < 10**6:
            raise InputError(f"keep_hours must be 0 or a number of hours, got {self.keep_hours}.")

    def superfluous(self, saved: dict[int, float], newest: int, best: int | None) -> list[int]:
        """Of the checkpoints `saved` (number of batches: seconds of its time), those to remove after saving `newest`.

        Those after `newest` are left alone: they are of a run that went on from an earlier one, and will be replaced.
        """
        older = sorted(batches for batches in saved if batches <= newest)
        kept = {newest, best, *older[-self.keep_last :]}
        last = float("-inf")
        for batches in older:
            if self.keep_every and batches % self.keep_every == 0:
                kept.add(batches)
            if self.keep_hours and saved[batches] - last >= self.keep_hours * 3600:
                kept.add(batches)
                last = saved[batches]
        return [batches for batches in older if batches not in kept]


class RunFolder:
    """The folder of one run, opened for training.

    Of several processes (jax.distributed), all open it and call its methods together; process 0 alone writes, and the
    others read what it wrote, so the folder must be shared. What fails in one of them is raised in all.

    Opening raises InputError where another process trains in it, or it cannot be written.
    """

    def __init__(self, path: str | Path, retention: Retention = Retention()) -> None:
        self.path = user_path(path).absolute()
        self.retention = retention
        self._thread: threading.Thread | None = None
        self._failure: InputError | None = None
        self._whole: set[int] = set()
        self._lock: int | None = None
        with together():
            if jax.process_index() == 0:
                self._open()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        self._join()  # without the other processes, which may know nothing of this error
        if self._failure is not None:
            _log.warning("%s", self._failure)
        self._unlock()

    # saving

    def save(self, batches: int, config: ModelConfig, params: Params, state: Any) -> None:
        """Save the checkpoint after so many batches: `params` to draw from, and `state`, any tree of arrays.

        Returns when all arrays are copied to the host; a thread writes them. At most one is being written: the next
        call waits for it. Raises InputError where the one before could not be written.
        """
        self.wait()
        if batches in self._whole:
            return
        held, copies = state_io.on_host((params, state))
        self._whole.add(batches)
        if jax.process_index() == 0:
            leaves = state_io.described(state, copies)
            self._thread = threading.Thread(
                target=self._save, args=(batches, config, held, leaves), name=f"checkpoint {batches}"
            )
            self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises InputError where it could not be."""
        try:
            with together():
                self._join()
                failure, self._failure = self._failure, None
                if failure is not None:
                    raise failure
        except InputError:
            self._whole.clear()
            raise

    def close(self) -> None:
        """As `wait`; then another process may train here."""
        try:
            self.wait()
        finally:
            self._unlock()

    def mark_best(self, batches: int, score: float, told: Mapping[str, Any] = {}) -> None:
        """Note that a checkpoint is the best so far, by this score, and what else is `told` of it.

        It is never removed. The next one marked takes its place.
        """
        self.wait()
        with together():
            if jax.process_index() == 0:
                if batches not in self.steps():
                    raise InputError(f"{self.path} has no checkpoint after {batches} batches to be called the best.")
                with atomic_write(self.path / "best.json") as beside:
                    beside.write_text(json.dumps({"batches": batches, "score": float(score), **told}) + "\n", "utf-8")

    # reading

    def steps(self) -> list[int]:
        """The numbers of batches of the checkpoints that are here, rising."""
        return [batches for batches, path in native.run_checkpoints(self.path).items() if (path / _STATE).is_file()]

    def latest(self) -> int | None:
        """The newest checkpoint's number of batches; None where there is none yet."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The number of batches of the checkpoint marked as the best, if one is."""
        return native.best_checkpoint(self.path)

    def restore(self, batches: int, template: Any) -> Any:
        """The state after so many batches, in the structure of `template`; every leaf is placed on the devices as the
        template's is, whatever they were when it was saved, and has the same bits.

        Raises InputError where there is none, where it is damaged, or differs from the template in a leaf.
        """
        with together():
            if batches not in self.steps():
                here = ", ".join(map(str, self.steps())) or "none"
                raise InputError(f"{self.path} has no checkpoint after {batches} batches; it has {here}.")
            state = state_io.read(self._folder(batches) / _STATE, template)
        self._whole.add(batches)
        return state

    def resume(self, template: Any) -> tuple[int, Any] | None:
        """(batches, state) of the newest checkpoint that is whole; None in a run that has none yet.

        A damaged one stays where it is and is named in a warning; the run goes on from the one before. Raises
        InputError where all are damaged, or where one differs from the template.
        """
        damaged: list[DamagedError] = []
        candidates = self.steps()
        while (batches := first_process(candidates.pop() if candidates else -1)) >= 0:
            try:
                state = self.restore(batches, template)
            except DamagedError as error:
                damaged.append(error)
                continue
            for error in damaged:
                _log.warning("%s Going on from the checkpoint after %d batches.", error, batches)
            return batches, state
        if damaged:
            raise InputError(f"No checkpoint in {self.path} is whole: {damaged[0]} Start in a new folder.")
        return None

    # the process that writes

    def _open(self) -> None:
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"Cannot train in {self.path}: {error.strerror or error}. Name another folder.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 500).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise InputError(
                f"Another process ({holder}) trains in {self.path}: wait for its end, stop it, or name another folder."
            ) from error
        except OSError as error:  # some network file systems know no locks
            _log.warning("%s cannot be locked (%s): see that only one process trains in it.", self.path, error.strerror)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        os.ftruncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}, since {since}".encode())
        self._lock = handle
        for left in (self.path / "checkpoints").glob(f"{_REPLACED}*"):
            original = left.with_name(left.name.removeprefix(_REPLACED))
            if not original.exists():
                os.replace(left, original)
        for left in (*self.path.glob(f"{UNFINISHED}*"), *self.path.glob(f"*/{UNFINISHED}*")):
            shutil.rmtree(left, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _folder(self, batches: int) -> Path:
        return self.path / "checkpoints" / f"{batches:08d}"

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(self, batches: int, config: ModelConfig, params: Params, leaves: dict[str, Leaf]) -> None:
        """In the thread: write, rename, remove what is superfluous."""
        try:
            with write_errors(self._folder(batches)):
                self._write(batches, config, params, leaves)
            self._tidy(batches)
        except InputError as error:
            last = max((step for step in self.steps() if step < batches), default=None)
            stays = "None was saved before it." if last is None else f"The one after {last} batches is there still."
            self._failure = InputError(f"The checkpoint after {batches} batches could not be saved: {error} {stays}")

    def _write(self, batches: int, config: ModelConfig, params: Params, leaves: dict[str, Leaf]) -> None:
        place = self._folder(batches)
        fresh, replaced = place.with_name(f"{UNFINISHED}{place.name}"), place.with_name(f"{_REPLACED}{place.name}")
        try:
            native.save(fresh, config, params)
            (fresh / _STATE.parent).mkdir()
            state_io.write(fresh / _STATE, leaves)
            fsync_tree(fresh)
            if place.exists():  # a damaged one, or one that was not gone on from
                os.replace(place, replaced)
            os.replace(fresh, place)
            fsync_path(place.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _tidy(self, newest: int) -> None:
        try:
            times = {step: (self._folder(step) / "config.json").stat().st_mtime for step in self.steps()}
            for step in self.retention.superfluous(times, newest, self.best()):
                remove(self._folder(step))
        except (InputError, OSError) as error:
            _log.warning("Old checkpoints in %s were not removed: %s", self.path, error)
