"""A run made ready: the data opened, the teacher read, everything checked, and nothing written."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax import conversion
from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.resolve import resolve
from cm_jax.conversion import Source
from cm_jax.data import Dataset
from cm_jax.errors import InputError, indented_list
from cm_jax.objectives import Objective
from cm_jax.training import prefetch
from cm_jax.training.config import TrainConfig
from cm_jax.training.parallelism import Parallelism
from cm_jax.training.run.evaluation_hook import Evaluator, make_ready
from cm_jax.training.state import Constants, RawBatch, TrainState
from cm_jax.training.step import Curves, TrainingStep
from cm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything has been checked, nothing has been written."""

    settings: TrainConfig
    dataset: Dataset
    across: Parallelism
    step: TrainingStep
    teacher: Source | None
    perceptual: Params | None
    """Weights of a distance that has some (LPIPS)."""
    evaluator: Evaluator | None = None

    @property
    def resident(self) -> bool:
        return prefetch.is_resident(self.dataset)

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
            assert self.step.models.teacher is not None
            teacher = self.step.models.teacher.network.prepare(self.teacher.params)
        images = labels = None
        if self.resident:
            images = self.dataset.images  # type: ignore[attr-defined]  # it is in memory
            labels = self.dataset.labels if self.labelled else None  # type: ignore[attr-defined]
        return self.across.place_constants(Constants(teacher, self.perceptual, images, labels))

    def dispatches(self, start: int, stop: int) -> Iterator[RawBatch]:
        return prefetch.dispatches(
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
            return network.initialize(jax.random.fold_in(jax.random.key(self.settings.seed), 2**31))
        source = self.teacher if not wanted and self.teacher is not None else _read(wanted, "start")
        _check_start(self.settings, source)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), source.params)


def prepare(chosen: TrainConfig, progress: Callable[[int, int], None] | None = None) -> Prepared:
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
    evaluator = chosen.evaluation and make_ready(chosen.evaluation, chosen.model_config(dataset), dataset)
    return Prepared(chosen, dataset, across, step, teacher, _weights(chosen.objective), evaluator)


def _read(name: str, flag: str) -> Source:
    """A checkpoint that the settings name."""
    try:
        return conversion.read(resolve(name))
    except InputError as error:
        folder = name.removesuffix("/best")
        run = folder.removeprefix("runs/")
        advice = f" Train it first: cm-jax train {run}." if run != folder and not os.path.exists(folder) else ""
        if os.path.isfile(name):
            advice = " What a file does not tell, `cm-jax convert` asks for: give --" + flag + " the folder it writes."
        raise InputError(f"--{flag} {name}: {error}{advice}") from error


_RUNTIME = ("dropout", "precision", "attention", "rematerialize")
"""Fields of a network that do not change what its parameters mean."""


def _check_start(chosen: TrainConfig, source: Source) -> None:
    """Raise InputError where the student cannot begin with these weights."""
    found, wanted = source.config.network, chosen.network
    if type(found) is type(wanted):
        found = dataclasses.replace(found, **{name: getattr(wanted, name) for name in _RUNTIME})  # type: ignore[type-var]
    complaints = serialization.differences(
        serialization.encode(found), serialization.encode(wanted), there="in the checkpoint"
    )
    level = jnp.full(1, 2.0)
    if float(source.config.preconditioning.c_noise(level)[0]) != float(chosen.preconditioning.c_noise(level)[0]):
        complaints.append(
            f"its clock is that of {source.config.preconditioning}, and the run's that of {chosen.preconditioning}"
        )
    if complaints:
        raise InputError(
            f"{source.path} has another network than this run:\n  {indented_list(complaints)}\n"
            "Give --network and --scaling the checkpoint's values, or --start fresh."
        )


def _weights(objective: Objective) -> Params | None:
    """Of its distance, where that has some."""
    return None if objective.distance is None else objective.distance.load_weights()
