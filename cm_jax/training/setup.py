"""Setup of a run: open the data, read the teacher, and check that all components fit, before anything is written."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import Source
from cm_jax.data import Dataset, InMemory
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.guidance import UniformGuidance
from cm_jax.diffusion.noise_schedule import NUM_LEVELS
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.objectives import Models
from cm_jax.parallelism import Parallelism, check_batch_size, choose
from cm_jax.progress import activity
from cm_jax.training.class_order import in_order_of_all, in_order_of_run, same_classes
from cm_jax.training.config import PARAMETERS, TrainConfig
from cm_jax.training.inheritance import inherited_data, inherited_network, with_classes_of
from cm_jax.training.initial_weights import check_initial_weights, initial_params, transfer_notes
from cm_jax.training.inputs import Inputs
from cm_jax.training.run.evaluation_hook import Evaluator, make_evaluator
from cm_jax.training.run.state_io import to_host
from cm_jax.training.step import Constants, Curves, StepBatch, TrainingStep, TrainState
from cm_jax.types import Params, digest

COMPILING = ("Compiling the training step", "usually 10 to 60 s")
"""Name of an activity, and its note."""
MAX_RESIDENT_BYTES = 512 * 2**20
"""Larger data sets are not copied to the devices."""


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
    notes: tuple[str, ...] = ()
    """What the user should know about the checkpoints that the teacher and the weights come from."""
    initial: Source | None = None
    """The checkpoint in init_from, unless the run is resumed."""

    @functools.cached_property
    def teacher_digest(self) -> str | None:
        """SHA-256 of the teacher's parameters. Its checkpoint may change between two starts of a run."""
        return self.teacher and digest(self.teacher.params)

    @property
    def resident(self) -> InMemory | None:
        """The data set if it is copied to the devices."""
        data = self.dataset
        return data if isinstance(data, InMemory) and data.images.nbytes <= MAX_RESIDENT_BYTES else None

    def initial_state(self) -> TrainState:
        """State before the first step, on the host."""
        network, name, source = self.config.network, self.config.init_from, self.teacher
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31)
        if name == "fresh" or not (name or source):
            with activity("Initializing the parameters"):
                params = to_host(network.initialize(key))
        else:
            source = source if source and not name else self.initial or Inputs().checkpoint(self.config, "init_from")
            check_initial_weights(self.config, source)
            params = initial_params(source, network, self.model_config.class_names, key)
        return to_host(self.step.initial_state(params, self.teacher and self.teacher.params))

    def state_shapes(self, step: TrainingStep | None = None) -> TrainState:
        """Shapes and dtypes of a state of the run's step, or of another."""
        teacher = self.teacher and self.teacher.config.network.shapes()
        return jax.eval_shape((step or self.step).initial_state, self.config.network.shapes(), teacher)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        shapes = self.state_shapes()
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, self.parallelism.shardings(shapes))

    def constants(self) -> Constants:
        """Constants of the step, on the devices."""
        return self.parallelism.place_constants(self.host_constants())

    def host_constants(self) -> Constants:
        """Constants of the step before they are placed."""
        teacher, function, data = None, self.step.models.teacher, self.resident
        if self.teacher and function and not self.step.objective.replaces_teacher:
            teacher = function.network.prepare(self.teacher.params)
        labels = data.labels if data and self.config.network.classes else None
        return Constants(teacher, self.perceptual, data and data.images, labels)

    def dispatches(self, start: int, stop: int) -> Iterator[StepBatch]:
        """This process's share of batches start ... stop - 1: NumPy arrays [steps, b, ...]; the last may be shorter."""
        size, seed, steps = self.config.batch_size, self.config.seed, self.config.steps_per_dispatch
        host, hosts, labeled = jax.process_index(), jax.process_count(), self.config.network.classes is not None
        data = self.dataset.shifted(self.config.image_offset)
        if self.resident is not None:
            share = slice(host * size // hosts, (host + 1) * size // hosts)
            batches = (StepBatch(indices=data.indices(size, seed, number)[share]) for number in range(start, stop))
        else:
            read = data.batches(size, seed, start, host, hosts)
            batches = (StepBatch(images, labels if labeled else None) for images, labels in read)
        for number in range(start, stop, steps):
            group = [next(batches) for _ in range(min(steps, stop - number))]
            yield jax.tree.map(lambda *arrays: np.stack(arrays), *group)

    def steps(self, state: TrainState | None = None) -> Iterator[tuple[int, TrainState, Curves]]:
        """Train from `state` (default: the initial one) to the end, in this process, without a folder.

        Yields (batches done, state, metrics [steps]) after every dispatch. A state is valid until the next step, which
        reuses its memory; `model` copies what it needs.
        """
        done = 0 if state is None else int(np.max(to_host(state.batches)))
        state = self.parallelism.place_state(state or self.initial_state())
        constants, key, program = self.constants(), jax.random.key(self.config.seed), self.compiled()
        for batches in self.dispatches(done, self.config.batches):
            state, metrics = program(state, constants, self.parallelism.place_batches(batches), key)
            done += len(jax.tree.leaves(batches)[0])
            yield done, state, metrics

    def model(self, state: TrainState) -> Model:
        """The model of a state, with the EMA that the run samples from."""
        return Model(self.model_config, self.config.network.prepare(self.sampled_params(state)))

    def config_after(self, batches: int) -> ModelConfig:
        """The config of the checkpoint after `batches`: with the number of steps of the last stage of PD."""
        objective = self.config.objective
        if not objective.replaces_teacher or objective.curriculum is None:
            return self.model_config
        return dataclasses.replace(self.model_config, default_steps=int(objective.curriculum(max(0, batches - 1))))

    def sampled_params(self, state: TrainState) -> Params:
        """The parameters to sample from, on the host, without those of the objective."""
        name, extras = self.config.sampled_ema, self.config.objective.extras()
        params = state.params if name == PARAMETERS else state.ema[name]
        return to_host({name: branch for name, branch in params.items() if name not in extras})

    def compiled(self) -> Callable[..., tuple[TrainState, Curves]]:
        return self.parallelism.compile(functools.partial(self.step.run_steps, self.parallelism), self.abstract_state())


def prepare(
    config: TrainConfig,
    stored: TrainConfig | None = None,
    *,
    resumed: ModelConfig | None = None,
    initial: bool = False,
    inputs: Inputs | None = None,
) -> TrainingSetup:
    """Set up a run. Raises InputError.

    stored: the settings of a run that resumes, from which it inherits network and data, so that the checkpoint is not
    needed again. resumed: config of the run's last checkpoint. initial: whether to read the checkpoint in init_from, as
    a new run needs it. inputs: where checkpoints and data come from.
    """
    inputs, parallelism, objective = inputs or Inputs(), make_parallelism(config), config.objective
    teacher, function, given, changes = _read_teacher(config, inputs), None, config.data, []
    inherits = config.inherit_network and bool(config.initial_checkpoint)
    chooses = inherits and stored is None
    reads = config.init_from not in ("", "fresh") and (initial or chooses)
    start = inputs.checkpoint(config, "init_from") if reads else None
    if config.inherit_data and config.initial_checkpoint:
        config, changes = inherited_data(config, stored)
    if inherits:
        found = stored.network if stored else next(source.config.network for source in (start, teacher) if source)
        config, more = inherited_network(config, found)
        changes += more
    sources = [(f"{flag} {each.path}", each) for flag, each in (("--teacher", teacher), ("--init-from", start)) if each]
    notes = [f"{name}: {note}" for name, each in sources for note in each.notes] + changes
    if teacher is not None:
        at_precision = teacher.config.network.at_precision(config.network.precision)
        function = dataclasses.replace(teacher.config.function, network=at_precision)
    step = make_step(config, function)
    if teacher is not None and not config.init_from:
        check_initial_weights(config, teacher)
    dataset = inputs.data(config, inherited=config.data != given)
    if chooses and start is not None and (other := with_classes_of(dataset, config)) != config:
        config, step = other, make_step(other, function)
    network = config.network
    _check_data(config, dataset)
    if network.classes is not None:
        orders = [
            (name, source.config.class_names)
            for name, source in sources
            if source is teacher or same_classes(dataset.class_names, source.config.class_names)
        ]
        if resumed is None:
            dataset = in_order_of_all(dataset, orders)
        else:
            dataset = in_order_of_run(dataset, resumed.class_names, orders)
    names = dataset.class_names if network.classes == len(dataset.class_names) else ()
    if start is not None and resumed is None:
        check_initial_weights(config, start)
        notes += transfer_notes(start, network, names)
    num_levels = objective.final_num_levels or config.num_levels or NUM_LEVELS
    consistency, guidance = not objective.makes_denoiser, objective.guidance
    stages = objective.curriculum if objective.replaces_teacher else None
    saved = ModelConfig(
        network,
        config.preconditioning,
        config.schedule,
        num_levels,
        names,
        consistency=consistency,
        label_dropout=None if network.classes is None else config.label_dropout,
        guidance_range=(guidance.low, guidance.high) if isinstance(guidance, UniformGuidance) else None,
        default_sampler="progdist" if stages else "",
        default_steps=stages and stages.final,
    )
    evaluator = config.evaluation and make_evaluator(config.evaluation, saved, dataset, parallelism)
    perceptual = objective.distance and objective.distance.load_weights()
    if objective.distance is not None:  # raises InputError for images that the distance cannot compare
        pixels = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
        jax.eval_shape(objective.distance.with_weights(perceptual), pixels, pixels)
    start = start if initial else None
    return TrainingSetup(config, dataset, saved, parallelism, step, teacher, perceptual, evaluator, tuple(notes), start)


def make_parallelism(config: TrainConfig) -> Parallelism:
    """The devices of a run. Raises InputError if the batch cannot be split among them."""
    parallelism = choose(config.parallel, shards=config.shards)
    check_batch_size(config.batch_size, len(parallelism.devices), config.grad_accum_steps)
    return parallelism


def make_step(config: TrainConfig, teacher: ConsistencyFunction | None) -> TrainingStep:
    """The training step. Raises InputError if its components contradict each other."""
    models, objective, target_ema = Models(config.function, teacher), config.objective, config.target_ema
    objective.check(models)
    if target_ema is not None:
        if not objective.has_target:
            name = type(objective).__name__
            raise InputError(f"{name} has no target network with an EMA: give --target-ema none.")
        target_ema.check(objective.curriculum)
    flip = config.flip and not (config.augmentation and config.augmentation.x_flip)  # which the network must know
    options = (config.grad_accum_steps, flip, config.augmentation, config.label_dropout)
    return TrainingStep(objective, models, config.optimizer, config.emas, target_ema, *options)


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


def _read_teacher(config: TrainConfig, inputs: Inputs) -> Source | None:
    method = type(config.objective).__name__
    if not config.objective.has_teacher:
        if config.teacher:
            raise InputError(f"{method} has no teacher: remove --teacher.")
        return None
    if not config.teacher:
        raise InputError(f"{method} needs a teacher: give a denoiser with --teacher CHECKPOINT.")
    teacher = inputs.checkpoint(config, "teacher")
    if teacher.config.distilled:
        raise InputError(f"Expected a denoiser as teacher, got the consistency model {config.teacher}.")
    if config.objective.guidance is not None and teacher.config.label_dropout == 0:
        raise InputError(
            f"Guidance needs a teacher trained with label dropout, and {config.teacher} was trained without: train it "
            "with --label-dropout 0.1, or give --objective.guidance none."
        )
    return teacher
