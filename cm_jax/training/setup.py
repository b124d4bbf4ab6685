"""Setup of a run: open the data, read the teacher, and check that all components fit, before anything is written."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax import conversion
from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.resolve import resolve
from cm_jax.conversion import Source
from cm_jax.data import Dataset
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import StepSchedule
from cm_jax.diffusion.noise_schedule import NUM_LEVELS
from cm_jax.errors import InputError, indented_list
from cm_jax.objectives import Models
from cm_jax.training import prefetch
from cm_jax.training.config import TrainConfig
from cm_jax.training.parallelism import OneDevice, Parallelism, Pmap, Sharded, check_batch_size
from cm_jax.training.run.evaluation_hook import Evaluator, make_evaluator
from cm_jax.training.state import Constants, StepBatch, TrainState
from cm_jax.training.step import Curves, TrainingStep
from cm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """Everything that a run needs, checked."""

    config: TrainConfig
    dataset: Dataset
    model_config: ModelConfig
    """Config of the run's checkpoints."""
    parallelism: Parallelism
    step: TrainingStep
    teacher: Source | None
    perceptual: Params | None
    """Weights of a perceptual distance (LPIPS)."""
    evaluator: Evaluator | None = None

    @property
    def resident(self) -> bool:
        return prefetch.is_resident(self.dataset)

    @property
    def labeled(self) -> bool:
        return self.config.network.classes is not None

    def initial_state(self) -> TrainState:
        """State before the first step, on the host."""
        teacher = None if self.teacher is None else self.teacher.params
        return self.step.initial_state(self._initial_params(), teacher)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        teacher = None if self.teacher is None else self.teacher.config.network.shapes()
        shapes = jax.eval_shape(self.step.initial_state, self.config.network.shapes(), teacher)
        shardings = self.parallelism.shardings(shapes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )

    def constants(self) -> Constants:
        """Constants of the step, on the devices."""
        teacher = None
        if self.teacher is not None and not self.step.objective.replaces_teacher:
            assert self.step.models.teacher is not None
            teacher = self.step.models.teacher.network.prepare(self.teacher.params)
        images = labels = None
        if self.resident:
            images = self.dataset.images  # type: ignore[attr-defined]  # it is in memory
            labels = self.dataset.labels if self.labeled else None  # type: ignore[attr-defined]
        return self.parallelism.place_constants(Constants(teacher, self.perceptual, images, labels))

    def dispatches(self, start: int, stop: int) -> Iterator[StepBatch]:
        return prefetch.dispatches(
            self.dataset,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=start,
            stop=stop,
            steps=self.config.steps_per_dispatch,
            labeled=self.labeled,
            resident=self.resident,
        )

    def compiled(self, constants: Constants) -> Callable[..., tuple[TrainState, Curves]]:
        program = functools.partial(self.step.run_steps, self.parallelism)
        return self.parallelism.compile(program, self.abstract_state(), constants)

    def _initial_params(self) -> Params:
        network, name = self.config.network, self.config.init_from
        if name == "fresh" or (not name and self.teacher is None):
            return network.initialize(jax.random.fold_in(jax.random.key(self.config.seed), 2**31))
        source = self.teacher if not name and self.teacher is not None else _read_checkpoint(name, "init-from")
        _check_initial_weights(self.config, source)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), source.params)


def prepare(config: TrainConfig, progress: Callable[[int, int], None] | None = None) -> TrainingSetup:
    """Set up a run. `progress` is called with (images, total) while data are decoded. Raises InputError."""
    parallelism = make_parallelism(config)
    teacher = function = None
    method = type(config.objective).__name__
    if config.objective.has_teacher:
        if not config.teacher:
            raise InputError(f"{method} needs a teacher: give a denoiser with --teacher CHECKPOINT.")
        teacher = _read_checkpoint(config.teacher, "teacher")
        if teacher.config.distilled:
            raise InputError(f"Expected a denoiser as teacher, got the consistency model {config.teacher}.")
        network = teacher.config.network.at_precision(config.network.precision)
        function = dataclasses.replace(teacher.config.function, network=network)
    elif config.teacher:
        raise InputError(f"{method} has no teacher: remove --teacher.")
    step = make_step(config, function)
    if teacher is not None and not config.init_from:
        _check_initial_weights(config, teacher)
    dataset = config.data.open(config.network.image_size, progress)
    _check_data(config, dataset)
    saved = _model_config(config, dataset)
    evaluator = config.evaluation and make_evaluator(config.evaluation, saved, dataset)
    distance = config.objective.distance
    perceptual = None if distance is None else distance.load_weights()
    return TrainingSetup(config, dataset, saved, parallelism, step, teacher, perceptual, evaluator)


def make_parallelism(config: TrainConfig) -> Parallelism:
    """The devices of a run. Raises InputError if the batch cannot be split among them."""
    if config.parallel == "one" and jax.process_count() > 1:
        raise InputError("--parallel one supports one process only: remove it.")
    kind = config.parallel if config.parallel != "auto" else "pmap" if len(jax.devices()) > 1 else "one"
    parallelism = {"one": OneDevice(), "pmap": Pmap(), "sharded": Sharded()}[kind]
    check_batch_size(config.batch_size, len(parallelism.devices), config.grad_accum_steps)
    return parallelism


def make_step(config: TrainConfig, teacher: ConsistencyFunction | None) -> TrainingStep:
    """The training step. Raises InputError if its components contradict each other."""
    models = Models(config.function, teacher)
    config.objective.check(models)
    if config.target_ema is not None:
        config.target_ema.check(config.objective.curriculum)
    return TrainingStep(
        config.objective,
        models,
        config.optimizer,
        config.emas,
        config.target_ema,
        config.grad_accum_steps,
        config.flip,
    )


def _model_config(config: TrainConfig, dataset: Dataset) -> ModelConfig:
    """Config of the checkpoints of a run."""
    names = dataset.class_names if config.network.classes == len(dataset.class_names) else ()
    num_levels = config.objective.final_num_levels or config.num_levels or NUM_LEVELS
    consistency = not config.objective.makes_denoiser
    return ModelConfig(
        config.network, config.preconditioning, config.schedule, num_levels, names, consistency=consistency
    )


def unfinished_schedules(config: TrainConfig) -> Iterator[str]:
    """A warning for every curriculum and learning rate that is longer than the run."""
    for path, component in _components(config):
        if isinstance(component, StepSchedule) and component.duration > config.batches:
            field = component.LENGTH_FIELD.replace("_", "-")
            yield (
                f"--{path} takes {component.duration:,} steps, but the run has {config.batches:,}. "
                f"Change --{path}.{field} or raise --images."
            )


def _components(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(flag, component) of all nested components."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, path = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield path, value
            yield from _components(value, path + ".")


def _check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Raise InputError if the network does not fit the data."""
    expected, found = config.network.image_shape, dataset.image_shape
    if found != expected:
        raise InputError(f"The network expects images of shape {list(expected)}, the data have {list(found)}.")
    classes = config.network.classes
    if classes is not None and classes != dataset.classes:
        advice = f"{dataset.classes}, or none to train without labels" if dataset.classes else "none"
        raise InputError(
            f"The network has {classes} classes, the data have {dataset.classes or 'no labels'}: "
            f"give --network.classes {advice}."
        )


def _read_checkpoint(name: str, flag: str) -> Source:
    try:
        return conversion.read(resolve(name))
    except InputError as error:
        folder = name.removesuffix("/best")
        preset = folder.removeprefix("runs/")
        advice = f" Train it first: cm-jax train {preset}." if preset != folder and not os.path.exists(folder) else ""
        if os.path.isfile(name):
            advice = f" Convert it with `cm-jax convert` and give the new folder to --{flag}."
        raise InputError(f"--{flag} {name}: {error}{advice}") from error


_RUNTIME = ("dropout", "precision", "attention", "rematerialize")
"""Fields of a network that do not change the meaning of its parameters."""


def _check_initial_weights(config: TrainConfig, source: Source) -> None:
    """Raise InputError if the student cannot be initialized from a checkpoint."""
    found, expected = source.config.network, config.network
    if type(found) is type(expected):
        runtime = {name: getattr(expected, name) for name in _RUNTIME}
        found = dataclasses.replace(found, **runtime)  # type: ignore[type-var]
    complaints = serialization.differences(
        serialization.encode(found), serialization.encode(expected), there="in the checkpoint"
    )
    sigma, theirs, ours = jnp.full(1, 2.0), source.config.preconditioning, config.preconditioning
    if float(theirs.c_noise(sigma)[0]) != float(ours.c_noise(sigma)[0]):
        complaints.append(f"c_noise(sigma): that of {theirs} in the checkpoint, that of {ours} now")
    if complaints:
        raise InputError(
            f"The network in {source.path} differs from this run's:\n  {indented_list(complaints)}\n"
            "Give --network and --preconditioning the checkpoint's values, or --init-from fresh."
        )
