"""What a training run is: the settings that decide it, and what is checked before it starts."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import jax

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import AnyData, Dataset, EmojiData
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import AnyTargetEMA, StepSchedule
from cm_jax.diffusion.noise_schedule import NUM_LEVELS, KarrasSchedule
from cm_jax.diffusion.preconditioning import AnyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError, check_int, nearest
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.objectives import AnyObjective, Denoising, Models, Objective
from cm_jax.training.ema import EMA, averages_named
from cm_jax.training.optimizers import Adam, AnyOptimizer
from cm_jax.training.parallelism import OneDevice, Parallelism, Pmap, Sharded, check_batch_size
from cm_jax.training.run.evaluation_hook import PARAMETERS, PeriodicEvaluation
from cm_jax.training.step import TrainingStep
from cm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. Its folder's config.json holds all of this."""

    data: AnyData = EmojiData()
    network: SongUNet | ADMUNet = SongUNet()
    preconditioning: AnyPreconditioning = EDMPreconditioning()
    objective: AnyObjective = Denoising()
    optimizer: AnyOptimizer = Adam()
    target: AnyTargetEMA | None = None
    """mu(k), for a target that lags behind the student; None makes the student its own target."""
    schedule: KarrasSchedule = KarrasSchedule()
    """Noise schedule of the run and of the saved models."""
    num_levels: int | None = None
    """N that timesteps and indices of the saved models count, for an objective whose curriculum does not define it.
    Default: 40."""
    teacher: str = ""
    """Checkpoint of the denoiser to distil: a run's folder, one of ours, a .pt file or a diffusers folder."""
    start: str = ""
    """Checkpoint whose weights training begins with, or "fresh". Default: the teacher's where there is one."""
    batch_size: int = 128
    """Images in a step, over all devices and processes."""
    images: int = 10_000_000
    """Images to be seen in all. A finished run continues when this is raised."""
    averages: tuple[float, ...] = (0.9999,)
    """Rates of exponential averages of the parameters. One samples from the first average."""
    power_averages: tuple[float, ...] = ()
    """Relative widths of power-function averages (EDM2), such as 0.05 and 0.1."""
    flip: bool = True
    """Mirror every image with probability 1/2."""
    seed: int = 0
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, to save memory."""
    steps_per_dispatch: int = 1
    """Steps in one call of the compiled program: more spare small networks the time between calls."""
    parallel: Literal["auto", "one", "pmap", "sharded"] = "auto"
    """auto: pmap where there are several devices. sharded: parameters and their averages are split among devices."""
    max_consecutive_skips: int = 50
    """Training stops where so many steps in a row had gradients that were not finite; fewer are left out."""
    log_every: int = 50
    """Batches between lines of metrics.csv."""
    sample_every: int = 2_000
    """Batches between grids of samples."""
    checkpoint_every: int = 2_000
    """Batches between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Keep also every checkpoint at a multiple of so many batches; 0 keeps none of them."""
    keep_hours: float = 0.0
    """Keep also one checkpoint for every so many hours; 0 keeps none of them."""
    evaluation: PeriodicEvaluation | None = None
    """FID and its like of what the run draws, now and then; the best checkpoint is kept."""

    FREE: ClassVar[tuple[str, ...]] = (
        "images",
        "steps_per_dispatch",
        "parallel",
        "max_consecutive_skips",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "keep_hours",
        "evaluation",
    )
    """What may change when a run goes on: it decides how far and how, and not which numbers come out."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "images", "accumulate", "steps_per_dispatch", "log_every", "sample_every")
        for name in (*counts, "checkpoint_every", "keep_last", "max_consecutive_skips"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32 or self.keep_every < 0:
            raise InputError(
                f"seed must lie in 0 ... 2^32 - 1 and keep_every not be negative; got {self.seed}, {self.keep_every}."
            )
        if self.num_levels is not None:
            check_int("num_levels", self.num_levels, 2, 2**20)
        if self.num_levels is not None and self.objective.final_num_levels is not None:
            raise InputError(
                f"num_levels is {self.num_levels}, but {type(self.objective).__name__} trains a model of "
                f"{self.objective.final_num_levels} levels by its curriculum: give --num-levels none."
            )
        asked, names = self.evaluation and self.evaluation.average, [each.name for each in self.all_averages]
        if asked and asked not in (*names, PARAMETERS):
            raise InputError(
                f"There is no average {asked!r} to evaluate: the run has {', '.join((*names, PARAMETERS))}."
                f"{nearest(asked, (*names, PARAMETERS))}"
            )

    @property
    def batches(self) -> int:
        """Batches of the whole run: enough for `images`."""
        return -(-self.images // self.batch_size)

    @property
    def function(self) -> ConsistencyFunction:
        return ConsistencyFunction(self.network, self.preconditioning, self.schedule)

    @property
    def all_averages(self) -> tuple[EMA, ...]:
        return averages_named(self.averages, self.power_averages)

    @property
    def drawn_from(self) -> str:
        """The average that one samples from, or PARAMETERS."""
        asked = self.evaluation.average if self.evaluation else ""
        return asked or next((each.name for each in self.all_averages), PARAMETERS)

    def unfinished(self) -> Iterator[str]:
        """A line for every curriculum and every falling learning rate that the run ends before."""
        for path, part in _parts(self):
            if isinstance(part, StepSchedule) and part.duration > self.batches:
                field = part.LENGTH_FIELD.replace("_", "-")
                yield (
                    f"--{path} changes for {part.duration:,} steps, and the run has {self.batches:,}: it ends before. "
                    f"Give --{path}.{field}, or more --images."
                )

    def parallelism(self) -> Parallelism:
        """Raises InputError where the batch cannot be shared out."""
        several = len(jax.devices()) > 1
        if self.parallel == "one" and jax.process_count() > 1:
            raise InputError("--parallel one is for one process, and there are several: leave it out.")
        kind = self.parallel if self.parallel != "auto" else "pmap" if several else "one"
        across = {"one": OneDevice(), "pmap": Pmap(), "sharded": Sharded()}[kind]
        check_batch_size(self.batch_size, len(across.devices), self.accumulate)
        return across

    def step(self, teacher: ConsistencyFunction | None) -> TrainingStep:
        """Raises InputError where the parts do not go together."""
        models = Models(self.function, teacher)
        self.objective.check(models)
        if self.target is not None:
            self.target.check(self.objective.curriculum)
        return TrainingStep(
            self.objective, models, self.optimizer, self.all_averages, self.target, self.accumulate, self.flip
        )

    def model_config(self, dataset: Dataset) -> ModelConfig:
        """Of the checkpoints that the run leaves."""
        names = dataset.class_names if self.network.classes == len(dataset.class_names) else ()
        num_levels = self.objective.final_num_levels or self.num_levels or NUM_LEVELS
        consistency = not self.objective.makes_denoiser
        return ModelConfig(
            self.network, self.preconditioning, self.schedule, num_levels, names, consistency=consistency
        )

    def check_data(self, dataset: Dataset) -> None:
        """Raise InputError where the network and the data do not go together."""
        if dataset.image_shape != self.network.image_shape:
            found, wanted = map(_size, (dataset.image_shape, self.network.image_shape))
            raise InputError(f"The images are {found}, and the network is for {wanted}.")
        classes = self.network.classes
        if classes is not None and dataset.classes is None:
            raise InputError(
                f"The network has {classes} classes, and the data have no labels: give --network.classes none."
            )
        if classes is not None and classes != dataset.classes:
            raise InputError(
                f"The network has {classes} classes, and the data {dataset.classes}: give --network.classes "
                f"{dataset.classes}, or none to train without them."
            )


def without_extras(params: Params, objective: Objective) -> Params:
    """The network's own parameters: without what the objective trained beside them."""
    own = objective.extras()
    return {name: branch for name, branch in params.items() if name not in own}


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} with {shape[2]} channels"


def _parts(part: object, above: str = "") -> Iterator[tuple[str, object]]:
    """(path, part) of the settings inside, as the command line writes their paths."""
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value, path = getattr(part, field.name), above + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield path, value
            yield from _parts(value, path + ".")
