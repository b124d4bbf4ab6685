"""The training loop: step -> maybe log -> maybe checkpoint -> maybe samples -> maybe evaluate."""

import collections
import contextlib
import dataclasses
import operator
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from cm_jax.checkpoints import native, serialization
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_path
from cm_jax.io.images import fits_png
from cm_jax.parallelism.processes import Delayed, check_equal, in_any, raised_in_all
from cm_jax.progress import activity
from cm_jax.training.adaptation import adapted, template
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.changes import Settings, check_changes
from cm_jax.training.run.evaluation_hook import EvaluationHook, sample_grid
from cm_jax.training.run.folder import Retention, RunFolder
from cm_jax.training.run.history import Period, RunHistory, read_config, read_history
from cm_jax.training.run.metrics_log import LogCallback, MetricsLog, MetricsWindow
from cm_jax.training.run.plots import plot
from cm_jax.training.run.progress import Progress
from cm_jax.training.run.provenance import record_start
from cm_jax.training.run.signals import StopSignal
from cm_jax.training.schedules import (
    NEW_RUN,
    check_learning_rate,
    continuation,
    outrun_schedules,
    slow_target,
    unfinished_schedules,
)
from cm_jax.training.setup import COMPILING, TrainingSetup, prepare
from cm_jax.training.step import StepBatch, TrainState
from cm_jax.types import Params, digest, parameter_count

_SYNC_EVERY = 10
"""Dispatches between exchanges of the stop flag and of errors among processes, which wait for each other."""

Print = Callable[[str], None]


def train(
    config: TrainConfig,
    folder: str | Path,
    print_line: Print = print,
    *,
    allow_config_change: bool = False,
    log: LogCallback | None = None,
) -> None:
    """Train in a folder, from its latest checkpoint if it has one, until the run is finished or stopped by a signal.

    allow_config_change: whether a resumed run may change settings that change the numbers, which config_history.json
    records. log: called with (batches, {name: number}) for every row of metrics.csv and, with names "evaluation/...",
    of evaluations.csv; in process 0 only. Raises InputError if the settings contradict each other or the folder's.
    """
    folder = user_path(folder)
    with raised_in_all():
        stored, new = read_config(folder), not native.run_checkpoints(folder)
        if stored is None and not new:
            raise InputError(
                f"{folder} has checkpoints but no config.json, so that the settings of the run are not known: restore "
                f"the file, or {NEW_RUN}."
            )
        setup = prepare(config, stored, resumed=native.last_config(folder), initial=new)
        serialization.encode(setup.config)  # raises InputError for components of other packages that are not registered
        fresh = setup.initial_state() if new else None  # before the folder is created, so that an error leaves none
    if jax.process_count() > 1:
        check_equal(_inputs(setup, fresh))
    setup = dataclasses.replace(setup, initial=None)  # frees its memory
    with RunFolder(folder, Retention(config.keep_last, config.keep_every, config.keep_hours)) as opened:
        content, teacher = setup.dataset.content_hash, setup.teacher_digest
        now = Settings(setup.config, content, teacher)
        with raised_in_all():
            before, history = read_history(opened.path) or (now, RunHistory((Period(0, now),)))
            changes = check_changes(opened.path, before, now, opened.latest() or 0, allow_config_change)
        with activity("Reading the latest checkpoint"):
            resumed = opened.resume(lambda batches: template(setup, history.at(batches).config))
        done, state = resumed or (0, setup.parallelism.place_state(fresh or setup.initial_state()))
        del fresh
        if resumed:
            setup, state, adaptations = adapted(setup, state, history.at(done).config, done)
            changes += adaptations
        config = setup.config
        check_learning_rate(config, opened.path, done)
        history = history.continued(done, Settings(config, content, teacher))
        with raised_in_all():
            history.write(opened.path, config)
        hook = EvaluationHook(config, setup.evaluator, opened, done)
        schedules = (
            *unfinished_schedules(config),
            *outrun_schedules(config, before.config, done),
            *slow_target(config),
        )
        notes = [*history.lines(done), *changes, *schedules]
        for line in _summary(setup, done, notes):
            print_line(line)
        if done >= config.batches and not hook.due(done):
            print_line(f"{opened.path} is finished after {done} batches. {continuation(config)}")
            return
        with raised_in_all():
            record_start(opened.path, done, data=content, teacher=teacher)
        hook.start()
        _loop(setup, opened, hook, state, done, print_line, log, len(history.periods) - 1)


def _inputs(setup: TrainingSetup, fresh: TrainState | None) -> dict[str, Any]:
    """What must be equal in all processes: settings and, in place of paths, the content of files."""
    content = {
        "data": (setup.dataset.content_hash, setup.dataset.size, setup.resident is None),
        "teacher": setup.teacher_digest,
        "init_from": None,
        "initial parameters": fresh and digest(fresh.params),
    }
    return serialization.encode(setup.config) | content


def _loop(
    setup: TrainingSetup,
    folder: RunFolder,
    hook: EvaluationHook,
    state: TrainState,
    done: int,
    print_line: Print,
    callback: LogCallback | None,
    configuration: int,
) -> None:
    """configuration: its number in the history of the run."""
    config, total = setup.config, setup.config.batches
    constants, key, program = setup.constants(), jax.random.key(config.seed), setup.compiled()
    with raised_in_all():
        log = MetricsLog(folder.path, done, callback=callback)
    progress = Progress(done, total, config.batch_size)
    feed, batches, steps, errors = prefetch(setup.dispatches(done, total)), StepBatch(), 0, Delayed()
    with StopSignal() as stop, log, progress, contextlib.closing(feed):
        window = MetricsWindow(config, log, progress, done, configuration, folder.unlogged)

        def evaluate(done: int, params: Params) -> None:
            with activity("Evaluating"):
                print_line(hook.evaluate(done, params, log))

        if hook.due(done):  # the run was stopped before this evaluation
            evaluate(done, setup.sampled_params(state))
        for dispatches, first in enumerate(range(done, total, config.steps_per_dispatch), start=1):
            with errors.collected() if dispatches > 1 else raised_in_all():
                batches = next(feed, batches)  # after an error the batches before, until all processes know of it
            before, steps = steps, min(config.steps_per_dispatch, total - first)
            with activity(*COMPILING) if steps != before else contextlib.nullcontext():
                placed = setup.parallelism.place_batches(jax.tree.map(operator.itemgetter(slice(steps)), batches))
                state, metrics = program(state, constants, placed, key)
            folder.started = True
            with errors.collected():
                window.add(metrics)
            before, done = done, done + steps
            asked = jax.process_count() == 1 or dispatches % _SYNC_EVERY == 0
            stopping = asked and in_any(stop.requested)
            last = done >= total or stopping
            evaluating = hook.due(done) and not stopping
            snapshot = _passes(config.ema_snapshot_every, before, done)
            saving = last or evaluating or snapshot or _passes(config.checkpoint_every, before, done)
            sampling = _passes(config.sample_every, before, done) or (last and not stopping)
            if asked or saving or sampling:
                errors.exchange()
            if saving or sampling:
                with raised_in_all():
                    window.flush(write=done >= total)
                params = setup.sampled_params(state)
                if saving:
                    folder.save(done, setup.config_after(done), params, state, window.unlogged, snapshot=snapshot)
                if sampling:
                    images = sample_grid(setup.config_after(done), params)
                    with raised_in_all():
                        log.samples(done, images)
                if evaluating:
                    evaluate(done, params)
                if saving:
                    with raised_in_all():
                        plot(folder.path)
            if stopping:
                folder.wait()
                reason = stop.signal or "another process"
                print_line(f"Stopped by {reason} after {done} of {total} batches. Run the same command to resume.")
                return
        folder.wait()
    with raised_in_all():
        plot(folder.path)
    print_line(f"Finished: {done} batches. Sample from it: cm-jax sample {folder.path}")
    if (best := folder.best()) is not None:
        print_line(f"Best checkpoint, after {best} batches: cm-jax sample {folder.path}/best")


def _passes(every: int, before: int, done: int) -> bool:
    """Whether a multiple of `every` lies in (before, done]; never for 0."""
    return every > 0 and done // every > before // every


def prefetch(items: Iterator[Any], depth: int = 2) -> Generator[Any, None, None]:
    """The same items, of which a thread prepares `depth` in advance. Its exceptions are raised in the reader."""
    thread, end = ThreadPoolExecutor(1, "batches"), object()
    try:
        ready = collections.deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := ready.popleft().result()) is not end:
            ready.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def _summary(setup: TrainingSetup, done: int, notes: Iterable[str]) -> Iterator[str]:
    config, network = setup.config, setup.config.network
    devices, count = setup.parallelism.devices, parameter_count(network.shapes())
    yield setup.dataset.description
    yield (
        f"{type(config.objective).__name__}, {type(network).__name__} with {count:,} parameters, "
        f"{network.precision}, on {len(devices)} x {devices[0].device_kind} ({type(setup.parallelism).__name__})."
    )
    if setup.teacher is not None:
        yield f"Teacher: {setup.teacher.path}."
    yield from setup.notes
    if setup.evaluator is not None:
        yield f"Evaluation: {setup.evaluator.description}."
    if not fits_png(channels := network.image_shape[2], rgba=False):
        yield f"Note: images with {channels} channels do not fit into PNG files; samples are written as .npz."
    if config.snapshot_note:
        yield config.snapshot_note
    yield from map("Note: {}".format, notes)
    start = f"Resuming after batch {done:,}" if done else "Starting"
    yield f"{start}: {config.batches:,} batches of {config.batch_size} images."
