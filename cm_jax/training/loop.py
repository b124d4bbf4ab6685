"""The training loop: step -> maybe log -> maybe samples -> maybe checkpoint. It knows no method and no formula."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm_jax import conversion, settings
from cm_jax.arrays import Params
from cm_jax.conversion import Source
from cm_jax.data import Dataset
from cm_jax.distances import Resized
from cm_jax.errors import InputError, listed
from cm_jax.files import written_beside
from cm_jax.model import find
from cm_jax.perceptual import LPIPS
from cm_jax.training import feeding
from cm_jax.training.checkpointing import on_host
from cm_jax.training.log import Log
from cm_jax.training.parallelism import Parallelism
from cm_jax.training.plots import plot
from cm_jax.training.progress import Progress
from cm_jax.training.record import record_start
from cm_jax.training.run_folder import Retention, RunFolder
from cm_jax.training.samples import sheet
from cm_jax.training.state import Constants, RawBatch, TrainState
from cm_jax.training.step import Curves, TrainingStep
from cm_jax.training.stopping import Stop
from cm_jax.training.training import Training, without_extras

FORMAT = 1
"""Of a run's config.json."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything has been checked, nothing has been written."""

    settings: Training
    dataset: Dataset
    across: Parallelism
    step: TrainingStep
    teacher: Source | None
    perceptual: Params | None
    """Weights of a distance that has some (LPIPS)."""

    @property
    def resident(self) -> bool:
        return feeding.is_resident(self.dataset)

    @property
    def labelled(self) -> bool:
        return self.settings.network.classes is not None

    def fresh_state(self) -> TrainState:
        """On the host: the state before the first step."""
        teacher = None if self.teacher is None else self.teacher.params
        return self.step.initial(self._start(), teacher)

    def abstract_state(self) -> TrainState:
        """The shapes of a state, with where each leaf is to lie."""
        teacher = None if self.teacher is None else self.teacher.config.network.shapes()
        shapes = jax.eval_shape(self.step.initial, self.settings.network.shapes(), teacher)
        places = self.across.shardings(shapes)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        )

    def constants(self) -> Constants:
        """What every step reads, on the devices."""
        teacher = None
        if self.teacher is not None and not self.step.objective.hands_over:
            assert self.step.functions.teacher is not None
            teacher = self.step.functions.teacher.network.prepare(self.teacher.params)
        images = labels = None
        if self.resident:
            images = self.dataset.images  # type: ignore[attr-defined]  # it is in memory
            labels = self.dataset.labels if self.labelled else None  # type: ignore[attr-defined]
        return self.across.place_constants(Constants(teacher, self.perceptual, images, labels))

    def dispatches(self, start: int, stop: int) -> Iterator[RawBatch]:
        return feeding.dispatches(
            self.dataset,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            start=start,
            stop=stop,
            steps=self.settings.steps_per_dispatch,
            labelled=self.labelled,
            resident=self.resident,
        )

    def compiled(self, constants: Constants) -> Callable[..., tuple[TrainState, Curves]]:
        program = functools.partial(self.step.many, self.across)
        return self.across.compile(program, self.abstract_state(), constants)

    def _start(self) -> Params:
        """The parameters that training begins with."""
        network, wanted = self.settings.network, self.settings.start
        if wanted == "fresh" or (not wanted and self.teacher is None):
            return network.initialise(jax.random.fold_in(jax.random.key(self.settings.seed), 2**31))
        source = self.teacher if not wanted and self.teacher is not None else _read(wanted, "start")
        _check_start(self.settings, source)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), source.params)


def prepare(chosen: Training, progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Open the data, read the teacher, and check that all parts go together. Raises InputError where they do not."""
    across = chosen.parallelism()
    teacher = function = None
    if chosen.objective.has_teacher:
        if not chosen.teacher:
            raise InputError(
                f"{type(chosen.objective).__name__} needs a teacher: give --teacher CHECKPOINT, a denoiser."
            )
        teacher = _read(chosen.teacher, "teacher")
        network = teacher.config.network.at_precision(chosen.network.precision)
        function = dataclasses.replace(teacher.config.function, network=network)
        if teacher.config.distilled:
            raise InputError(f"The teacher {chosen.teacher} is a consistency model, and a denoiser is wanted.")
    elif chosen.teacher:
        raise InputError(f"{type(chosen.objective).__name__} has no use for a teacher: leave --teacher out.")
    step = chosen.step(function)
    if teacher is not None and not chosen.start:
        _check_start(chosen, teacher)
    dataset = chosen.data.open(chosen.network.image_size, progress)
    chosen.check_data(dataset)
    return Prepared(chosen, dataset, across, step, teacher, _perceptual(chosen))


def train(chosen: Training, folder: str | Path, say: Say = print, progress: Any = None) -> None:
    """Run it in its folder, from where the folder's newest checkpoint is, to its end or until it is asked to stop.

    Raises InputError for settings that do not go together, or that differ from those the folder was begun with.
    """
    run = prepare(chosen, progress)
    with RunFolder(folder, Retention(chosen.keep_last, chosen.keep_every)) as opened:
        _agree(opened.path, chosen)
        found = opened.resume(run.abstract_state())
        state = found[1] if found else run.across.place_state(run.fresh_state())
        done = found[0] if found else 0
        for line in _described(run, done):
            say(line)
        if done >= chosen.batches:
            say(f"{opened.path} is finished: {done} batches. Raise --images to go on.")
            return
        record_start(opened.path, done)
        _loop(run, opened, state, done, say)


def _loop(run: Prepared, folder: RunFolder, state: TrainState, done: int, say: Say) -> None:
    chosen, total = run.settings, run.settings.batches
    constants, key = run.constants(), jax.random.key(chosen.seed)
    program = run.compiled(constants)
    config = chosen.model_config(run.dataset)
    log, progress = Log(folder.path, done), Progress(done, total, chosen.batch_size)
    with Stop() as stop, log, progress, feeding.ahead(run.dispatches(done, total)) as feed:
        window = _Window(chosen, log, progress, done)
        for batches in feed:
            state, metrics = program(state, constants, run.across.place_batches(batches), key)
            window.add(metrics)
            done += chosen.steps_per_dispatch
            stopping = _agreed(stop.requested)
            last = done >= total or stopping

            def due(every: int, done: int = done) -> bool:
                return done // every > (done - chosen.steps_per_dispatch) // every

            saving = last or due(chosen.checkpoint_every)
            sampling = due(chosen.sample_every) or (last and not stopping)
            if saving or sampling:
                window.flush(write=last)
                averaged = on_host(without_extras(_averaged(run.step, state), run.step.objective))
            if saving:
                folder.save(done, config, averaged, state)
                plot(folder.path)
            if sampling:
                log.samples(done, sheet(config, averaged))
            if stopping:
                folder.wait()
                say(
                    f"Stopped by {stop.signal or 'another process'} after {done} of {total} batches, and saved. The same command goes on."
                )
                return
        folder.wait()
        window.flush(write=True)
    plot(folder.path)
    say(f"Finished: {done} batches. Draw from it: python sample.py {folder.path}")


class _Window:
    """Metrics on their way: those of a dispatch are fetched when the next one runs, and averaged over `log_every`."""

    def __init__(self, chosen: Training, log: Log, progress: Progress, done: int) -> None:
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
        host = jax.device_get(metrics)
        for place in range(self._chosen.steps_per_dispatch):
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
        row |= {"skipped": skipped, "learning_rate": float(self._rate(self._done - skipped - 1))}
        if self._progress.images_per_second:
            row["images_per_second"] = self._progress.images_per_second
        self._log.row(self._done, {"images": self._done * self._chosen.batch_size} | row)
        self._values = {}

    def _check(self, in_a_row: int, skipped: int) -> None:
        if in_a_row < self._chosen.most_skipped:
            return
        since = "from the first step" if skipped == self._done else f"up to batch {self._done}"
        raise InputError(
            f"The loss or its gradients were not finite in {in_a_row} steps in a row, {since}. Newest checkpoint and "
            "logs stay. Try a lower --optimizer.learning-rate.peak, a warm-up, --optimizer.clip-norm 1 or float32."
        )


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _averaged(step: TrainingStep, state: TrainState) -> Params:
    """The parameters that one samples from."""
    return state.averages[step.averages[0].name] if step.averages else state.params


def _agreed(requested: bool) -> bool:
    """Whether any process was asked to stop."""
    if jax.process_count() == 1:
        return requested
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(requested))))


def _agree(folder: Path, chosen: Training) -> None:
    """Write RUN/config.json; or raise InputError where the one that is there says something else."""
    file, text = folder / "config.json", settings.to_text(chosen, FORMAT)
    if file.exists():
        before = settings.from_text(file.read_text("utf-8"), Training, FORMAT, str(file), "the config of a run")
        same = dataclasses.replace(chosen, **{name: getattr(before, name) for name in Training.FREE})
        found = settings.differences(settings.encode(before), settings.encode(same))
        if found:
            raise InputError(
                f"{folder} was begun with other settings:\n  {listed(found)}\nGive the same ones, or another folder."
            )
    if jax.process_index() == 0:
        with written_beside(file) as beside:
            beside.write_text(text, "utf-8")


def _read(name: str, flag: str) -> Source:
    try:
        return conversion.read(find(name))
    except InputError as error:
        raise InputError(f"--{flag} {name}: {error}") from error


_RUNTIME = ("dropout", "precision", "attention", "rematerialise")
"""Fields of a network that do not change what its parameters mean."""


def _check_start(chosen: Training, source: Source) -> None:
    """Raise InputError where the student cannot begin with these weights."""
    found, wanted = source.config.network, chosen.network
    if type(found) is type(wanted):
        found = dataclasses.replace(found, **{name: getattr(wanted, name) for name in _RUNTIME})  # type: ignore[type-var]
    complaints = settings.differences(settings.encode(found), settings.encode(wanted))
    if source.config.scaling.c_noise(np.float32(2.0)) != chosen.scaling.c_noise(np.float32(2.0)):
        complaints.append(f"its clock is that of {source.config.scaling}, and the run's that of {chosen.scaling}")
    if complaints:
        raise InputError(
            f"{source.path} has another network than this run:\n  {listed(complaints)}\n"
            "Give --network and --scaling the checkpoint's values, or --start fresh."
        )


def _perceptual(chosen: Training) -> Params | None:
    distance = getattr(chosen.objective, "distance", None)
    while isinstance(distance, Resized):
        distance = distance.distance
    return distance.load_weights() if isinstance(distance, LPIPS) else None


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
    went = f"Going on after batch {done:,}" if done else "Starting"
    yield f"{went}: {chosen.batches:,} batches of {chosen.batch_size} images."
