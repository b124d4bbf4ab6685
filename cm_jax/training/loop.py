"""The training loop: step -> maybe log -> maybe checkpoint -> maybe samples -> maybe evaluate.

It knows no method and no formula.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm_jax.checkpoints import native, serialization
from cm_jax.errors import InputError, indented_list
from cm_jax.io.atomic import atomic_write
from cm_jax.training import prefetch
from cm_jax.training.config import TrainConfig, without_extras
from cm_jax.training.run.evaluation_hook import PARAMETERS
from cm_jax.training.run.evaluation_log import Evaluations
from cm_jax.training.run.folder import Retention, RunFolder
from cm_jax.training.run.metrics_log import Log
from cm_jax.training.run.plots import plot
from cm_jax.training.run.progress import Progress
from cm_jax.training.run.provenance import record_start
from cm_jax.training.run.sample_grids import sheet
from cm_jax.training.run.signals import Stop
from cm_jax.training.run.state_io import on_host
from cm_jax.training.setup import Prepared, prepare
from cm_jax.training.state import TrainState
from cm_jax.training.step import Curves, columns
from cm_jax.types import Params

FORMAT = 1
"""Of a run's config.json."""

_ASK_EVERY = 10
"""Dispatches after which processes ask each other whether one was told to stop."""

Say = Callable[[str], None]


def train(chosen: TrainConfig, folder: str | Path, say: Say = print, progress: Any = None) -> None:
    """Run it in its folder, from where the folder's newest checkpoint is, to its end or until it is asked to stop.

    Raises InputError for settings that do not go together, or that differ from those the folder was begun with.
    """
    run = prepare(chosen, progress)
    fresh = (
        None if native.run_checkpoints(Path(folder)) else run.fresh_state()
    )  # a refused start leaves no folder behind
    with RunFolder(folder, Retention(chosen.keep_last, chosen.keep_every, chosen.keep_hours)) as opened:
        _agree(opened.path, chosen)
        found = opened.resume(run.abstract_state())
        state = found[1] if found else run.across.place_state(fresh or run.fresh_state())
        del fresh
        done = found[0] if found else 0
        evaluations = Evaluations(chosen, run.evaluator, opened, done)
        for line in _described(run, done):
            say(line)
        if done >= chosen.batches and not evaluations.due(done):
            say(f"{opened.path} is finished: {done} batches. Raise --images to go on.")
            return
        record_start(opened.path, done)
        evaluations.begin()
        _loop(run, opened, evaluations, state, done, say)


def _loop(run: Prepared, folder: RunFolder, evaluations: Evaluations, state: TrainState, done: int, say: Say) -> None:
    chosen, total = run.settings, run.settings.batches
    constants, key = run.constants(), jax.random.key(chosen.seed)
    program = run.compiled(constants)
    config = chosen.model_config(run.dataset)
    log, progress = Log(folder.path, done), Progress(done, total, chosen.batch_size)
    with Stop() as stop, log, progress, prefetch.ahead(run.dispatches(done, total)) as feed:
        window = _Window(chosen, log, progress, done)

        def evaluate(done: int, averaged: Params) -> None:
            with progress.aside("evaluating"):
                say(evaluations.make(done, averaged, log))

        if evaluations.due(done):  # the run was stopped before it was made
            evaluate(done, _drawn_from(run, state))
        for dispatches, batches in enumerate(feed, start=1):
            steps = len(jax.tree.leaves(batches)[0])
            state, metrics = program(state, constants, run.across.place_batches(batches), key)
            window.add(metrics)
            done += steps
            stopping = _agreed(stop.requested, dispatches)
            last = done >= total or stopping

            def due(every: int, done: int = done, before: int = done - steps) -> bool:
                return done // every > before // every

            evaluating = evaluations.due(done) and not stopping
            saving = last or evaluating or due(chosen.checkpoint_every)
            sampling = due(chosen.sample_every) or (last and not stopping)
            if saving or sampling:
                window.flush(write=last)
                averaged = _drawn_from(run, state)
                if saving:
                    folder.save(done, config, averaged, state)
                if sampling:
                    log.samples(done, sheet(config, averaged))
                if evaluating:
                    evaluate(done, averaged)
                if saving:
                    plot(folder.path)
            if stopping:
                folder.wait()
                who = stop.signal or "another process"
                say(f"Stopped by {who} after {done} of {total} batches, and saved. The same command goes on.")
                return
        folder.wait()
        window.flush(write=True)
    plot(folder.path)
    say(f"Finished: {done} batches. Draw from it: cm-jax sample {folder.path}")
    if (best := folder.best()) is not None:
        say(f"The best was after {best} batches: cm-jax sample {folder.path}/best")


class _Window:
    """Metrics on their way: those of a dispatch are fetched when the next one runs, and averaged over `log_every`."""

    def __init__(self, chosen: TrainConfig, log: Log, progress: Progress, done: int) -> None:
        self._chosen, self._log, self._progress, self._done = chosen, log, progress, done
        self._waiting: Curves | None = None
        self._values: dict[str, list[float]] = {}
        self._rate = chosen.optimizer.learning_rate.schedule()

    def add(self, metrics: Curves) -> None:
        """Of the dispatch that has just been started."""
        before, self._waiting = self._waiting, metrics
        self._take(before)

    def flush(self, write: bool) -> None:
        """Fetch what waits; and write a line of what has come together, though it be less than is usual."""
        before, self._waiting = self._waiting, None
        self._take(before)
        if write and self._values:
            self._write()

    def _take(self, metrics: Curves | None) -> None:
        if metrics is None:
            return
        host = columns(jax.device_get(metrics))
        for place in range(len(host["loss"])):
            self._done += 1
            for name, values in host.items():
                self._values.setdefault(name, []).append(float(values[place]))
            if self._done % self._chosen.log_every == 0:
                self._write()
        self._progress.update(self._done, float(host["loss"][-1]))
        self._check(int(host["skipped_in_a_row"].max()), int(host["skipped"][-1]))

    def _write(self) -> None:
        row = {
            name: _mean(values) for name, values in self._values.items() if name not in ("skipped", "skipped_in_a_row")
        }
        skipped = int(self._values["skipped"][-1])
        row |= {"skipped": skipped, "learning_rate": float(np.asarray(self._rate(self._done - skipped - 1)))}
        if self._progress.images_per_second:
            row["images_per_second"] = self._progress.images_per_second
        self._log.row(self._done, {"images": self._done * self._chosen.batch_size} | row)
        self._values = {}

    def _check(self, in_a_row: int, skipped: int) -> None:
        if in_a_row < self._chosen.max_consecutive_skips:
            return
        since = "from the first step" if skipped == self._done else f"up to batch {self._done}"
        raise InputError(
            f"The loss or its gradients were not finite in {in_a_row} steps in a row, {since}. Newest checkpoint and "
            "logs stay. Try a lower --optimizer.learning-rate.peak, a warm-up, --optimizer.clip-norm 1 or float32."
        )


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _drawn_from(run: Prepared, state: TrainState) -> Params:
    """The parameters that one samples from, on the host."""
    name = run.settings.drawn_from
    params = state.params if name == PARAMETERS else state.averages[name]
    return on_host(without_extras(params, run.step.objective))


def _agreed(requested: bool, dispatches: int) -> bool:
    """Whether any process was asked to stop. Several ask each other now and then only, as it makes them wait."""
    if jax.process_count() == 1:
        return requested
    if dispatches % _ASK_EVERY:
        return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(requested))))


def _agree(folder: Path, chosen: TrainConfig) -> None:
    """Write RUN/config.json; or raise InputError where the one that is there says something else."""
    file, text = folder / "config.json", serialization.to_text(chosen, FORMAT)
    if file.exists():
        try:
            there = file.read_text("utf-8", "replace")
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
        before = serialization.from_text(there, TrainConfig, FORMAT, str(file), "the config of a run")
        same = dataclasses.replace(chosen, **{name: getattr(before, name) for name in TrainConfig.FREE})
        found = serialization.differences(serialization.encode(before), serialization.encode(same))
        if before.drawn_from != chosen.drawn_from:  # all checkpoints of a run hold the same average to draw from
            found.append(f"evaluation.average: {before.drawn_from} in the folder, {chosen.drawn_from} now")
        if found:
            raise InputError(
                f"{folder} has other settings:\n  {indented_list(found)}\nGive the same ones, or another folder."
            )
    if jax.process_index() == 0:
        with atomic_write(file) as beside:
            beside.write_text(text, "utf-8")


def _described(run: Prepared, done: int) -> Iterator[str]:
    chosen, network = run.settings, run.settings.network
    devices = run.across.devices
    yield run.dataset.description
    yield (
        f"{type(chosen.objective).__name__}, {type(network).__name__} with {network.parameter_count():,} parameters, "
        f"{network.precision}, on {len(devices)} x {devices[0].device_kind} ({type(run.across).__name__})."
    )
    if run.teacher is not None:
        yield f"Teacher: {run.teacher.path}."
    if run.evaluator is not None:
        yield f"Evaluation: {run.evaluator.description}."
    yield from map("Note: {}".format, chosen.unfinished())
    went = f"Going on after batch {done:,}" if done else "Starting"
    yield f"{went}: {chosen.batches:,} batches of {chosen.batch_size} images."
