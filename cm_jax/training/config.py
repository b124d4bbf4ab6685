"""Settings of a training run."""

import dataclasses
from typing import ClassVar, Literal

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.serialization import HIDDEN
from cm_jax.checkpoints.state_archive import NONE, EMAName
from cm_jax.data import AnyData, EmojiData
from cm_jax.data.augmentation import Augmentation
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import AnyTargetEMA
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import AnyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError, check_int
from cm_jax.evaluation.evaluate import EvalConfig
from cm_jax.networks import AnyNetwork, SongUNet
from cm_jax.objectives import AnyObjective, Denoising
from cm_jax.parallelism import Kind
from cm_jax.training.ema import AnyEMA, ConstantEMA, PowerEMA
from cm_jax.training.optimizers import Adam, AnyOptimizer
from cm_jax.types import parameter_count

PARAMETERS = "parameters"
"""Value of `PeriodicEvaluation.ema` that stands for the parameters without EMA."""
BEST_METRICS = {"fid": "fid", "sfid": "sfid", "kid": "kid", "is": "inception_score"}
"""Metrics that can choose the best checkpoint, and the names of their values."""


@dataclasses.dataclass(frozen=True)
class PeriodicEvaluation:
    """Evaluation during training. The checkpoint with the best first metric is kept."""

    every: int = 500_000
    """Images between evaluations. The end of the run is evaluated, too."""
    count: int = 10_000
    """Number of samples per evaluation."""
    steps: tuple[int, ...] = ()
    """Sampling steps of the consistency sampler, or of Heun's for a denoiser. Each number is evaluated, and the first
    chooses the best checkpoint. Default: 1, or 18 for a denoiser."""
    metrics: tuple[Literal["fid", "sfid", "kid", "is", "pr", "prdc"], ...] = ("fid",)
    """Metrics, as of `evaluate`. The first chooses the best checkpoint and must be fid, sfid, kid or is."""
    reference: str = ""
    """Reference, as of `evaluate`: emoji:held_out, tfds:NAME, a folder, an .npz file of images or statistics. Default:
    the training images."""
    ema: str = ""
    """EMA to evaluate and to save for sampling: 0.9999, power_0.1, or none for the parameters without EMA. Default: the
    first EMA."""
    inception: str = ""
    """Weights of Inception-V3. Default: the file that CM_JAX_INCEPTION names."""
    seed: int = 0
    """Sampling seed, the same in every evaluation."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("every", "inception")
    """Fields that may change between evaluations of a run."""

    def __post_init__(self) -> None:
        serialization.check_types(self)
        check_int("every", self.every, 1, 10**15)
        check_int("count", self.count, 2, 10**9)
        check_int("seed", self.seed, 0, 2**32 - 1)
        for steps in self.steps:
            check_int("steps", steps, 1, 10**6)
        if len(set(self.steps)) < len(self.steps):
            raise InputError(f"Expected different numbers of steps, got {', '.join(map(str, self.steps))}.")
        first = EvalConfig(self.metrics).metrics[0]
        if first not in BEST_METRICS:
            expected = ", ".join(BEST_METRICS)
            raise InputError(f"The first metric chooses the best checkpoint: expected one of {expected}, got {first}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run, stored as config.json in its folder."""

    data: AnyData = EmojiData()
    """Training images."""
    network: AnyNetwork = SongUNet()
    """Network architecture."""
    preconditioning: AnyPreconditioning = EDMPreconditioning()
    """c_in, c_skip, c_out and c_noise."""
    objective: AnyObjective = Denoising()
    """Training method."""
    optimizer: AnyOptimizer = Adam()
    """Optimizer with its learning rate."""
    target_ema: AnyTargetEMA | None = None
    """EMA decay mu(k) of the target network. None: the target is the student."""
    schedule: KarrasSchedule = KarrasSchedule()
    """Noise schedule of the run and of the saved models."""
    num_levels: int | None = None
    """N of the saved models, for an objective whose curriculum does not define it. Default: 40."""
    teacher: str = ""
    """Denoiser to distill: a checkpoint, run folder, id of the Hugging Face Hub or name of a model, as for `sample`."""
    teacher_key: str = ""
    """For a teacher's file with several networks: the key of the one to read. Default: as of `sample --key`."""
    teacher_ema: str = ""
    """For the run of a teacher: its EMA (0.9999, power_0.1), or none. Default: the one that the run samples from."""
    init_from: str = ""
    """Checkpoint to initialize the weights from, or "fresh" for random weights. Default: the teacher, if any."""
    init_from_key: str = ""
    """For --init-from: as --teacher-key. Default: as of `sample --key`."""
    init_from_ema: str = ""
    """For --init-from: as --teacher-ema. Default: the one that the run samples from."""
    inherit_network: bool = False
    """Take the architecture from the checkpoint of --init-from or --teacher. Of --network, only dropout, dropout-size,
    precision, attention, rematerialize and the fields in --network-fields are used. With --init-from, the number of
    classes is that of the data. Default: if there is a checkpoint and no --network NAME; in Python, False."""
    network_fields: tuple[str, ...] = ()
    """Fields of --network that replace those of the inherited architecture. The command line adds those it sets."""
    inherit_data: bool = False
    """Take the data from the run of --init-from or --teacher. Default: if there is such a run and no --data; in
    Python, False."""
    batch_size: int = 128
    """Images per training step, over all devices and processes."""
    images: int = 10_000_000
    """Images to train on in total. Raise it to continue a finished run."""
    ema_decay: tuple[float, ...] = (0.9999,)
    """Decays of EMAs of the parameters. Samples come from the first EMA."""
    power_ema: tuple[float, ...] = ()
    """Relative widths of power-function EMAs (EDM2), such as 0.05 and 0.1."""
    flip: bool = True
    """Flip every image horizontally with probability 1/2, unless the augmentation does it."""
    augmentation: Augmentation | None = None
    """Augmentation whose parameters the network takes as input (EDM); needs --network.augment-dim 9."""
    label_dropout: float = 0.0
    """Probability of training an image without its label, as classifier-free guidance of the model needs (0.1)."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the noise."""
    grad_accum_steps: int = 1
    """Microbatches per step: gradients are accumulated, which saves memory."""
    steps_per_dispatch: int = 1
    """Training steps per call of the compiled program. More steps reduce the overhead for small networks."""
    parallel: Kind = "auto"
    """Parallelism: one device; pmap or mesh (jit over a mesh), with a full copy of the state on every device; sharded
    (a mesh that splits parameters, optimizer state and EMAs). auto: pmap on one host, mesh across hosts."""
    shards: int | None = None
    """Devices that share one copy of a sharded state: those of a host keep its gathers inside. Default: all devices."""
    max_consecutive_skips: int = 50
    """Stop after this many consecutive steps with gradients that are not finite. Fewer are skipped."""
    log_every: int = 50
    """Batches between rows of metrics.csv. The first and the last batch have a row, too."""
    sample_every: int = 2_000
    """Batches between grids of samples."""
    checkpoint_every: int = 2_000
    """Batches between checkpoints."""
    keep_last: int = 2
    """Number of latest checkpoints to keep."""
    keep_every: int = 0
    """Keep every checkpoint at a multiple of this number of batches. 0: none."""
    keep_hours: float = 0.0
    """Keep one checkpoint per this number of hours. 0: none."""
    ema_snapshot_every: int = 0
    """Batches between snapshots of the power-function EMAs, from which other widths can be reconstructed after
    training; a checkpoint is saved, too. All are kept. Needs two widths, such as --power-ema 0.05 0.1. 0: none."""
    evaluation: PeriodicEvaluation | None = None
    """Evaluation during training (FID and others)."""

    image_offset: int = dataclasses.field(default=0, metadata=HIDDEN)
    """Images before batch 0, which may be negative: a resumed run sets it when its batch size changes, so that images
    are counted and read without a gap."""

    def __post_init__(self) -> None:
        serialization.check_types(self)
        sizes = ("batch_size", "images", "grad_accum_steps", "steps_per_dispatch", "max_consecutive_skips")
        for name in (*sizes, "log_every", "sample_every", "checkpoint_every", "keep_last"):
            check_int(name, getattr(self, name), 1, 10**15)
        if self.shards is not None:
            check_int("shards", self.shards, 1, 10**6)
        check_int("seed", self.seed, 0, 2**32 - 1)
        check_int("keep_every", self.keep_every, 0, 10**15)
        if check_int("ema_snapshot_every", self.ema_snapshot_every, 0, 10**15):
            if len(set(self.power_ema)) < 2:
                got = ", ".join(map(str, self.power_ema)) or "none"
                raise InputError(f"ema_snapshot_every needs two power-function EMAs, such as 0.05 and 0.1, got {got}.")
            if self.objective.replaces_teacher:
                raise InputError(
                    "Progressive distillation restarts the EMAs in each stage: leave out ema_snapshot_every."
                )
        if not 0 <= self.label_dropout <= 1:
            raise InputError(f"Expected label_dropout in [0, 1], got {self.label_dropout}.")
        if self.label_dropout and self.network.classes is None:
            raise InputError("label_dropout needs a class-conditional network, and this one has no classes: give 0.")
        if self.augmentation is not None and getattr(self.network, "augment_dim", 0) != self.augmentation.PARAMETERS:
            raise InputError(
                "augmentation needs a network that takes its parameters as input, or samples show it: give "
                f"--network.augment-dim {self.augmentation.PARAMETERS}, for SongUNet or ADMUNet."
            )
        if self.num_levels is not None:
            check_int("num_levels", self.num_levels, 2, 2**20)
            method, final = type(self.objective).__name__, self.objective.final_num_levels
            if final is not None:
                raise InputError(
                    f"num_levels is {self.num_levels}, but {method} trains a model of {final} levels by its "
                    "curriculum: give --num-levels none."
                )
        for name in ("teacher", "init_from"):
            if (getattr(self, f"{name}_key") or getattr(self, f"{name}_ema")) and getattr(self, name) in ("", "fresh"):
                raise InputError(f"{name}_key and {name}_ema apply to a checkpoint: give {name}, or leave them out.")
        names, asked = [*(ema.name for ema in self.emas), PARAMETERS], self.sampled_ema
        if asked not in names:
            expected = " or ".join(str(EMAName.parse(name)) for name in names)
            raise InputError(f"Expected evaluation.ema to be {expected}, got {asked!r}.")

    @property
    def batches(self) -> int:
        """Batches of the whole run."""
        return -((self.image_offset - self.images) // self.batch_size)

    def images_after(self, batches: int) -> int:
        """Images that the run has trained on after `batches`."""
        return batches * self.batch_size + self.image_offset

    @property
    def initial_checkpoint(self) -> str:
        """The checkpoint that the weights come from; empty for random weights."""
        return "" if self.init_from == "fresh" else self.init_from or self.teacher

    @property
    def function(self) -> ConsistencyFunction:
        """The student."""
        return ConsistencyFunction(self.network, self.preconditioning, self.schedule)

    @property
    def emas(self) -> tuple[AnyEMA, ...]:
        return (*map(ConstantEMA, self.ema_decay), *map(PowerEMA, self.power_ema))

    @property
    def snapshot_note(self) -> str:
        """What snapshots of the EMAs the run stores, and their size; empty for a run without two such EMAs."""
        widths = " and ".join(map(str, self.power_ema))
        if self.ema_snapshot_every:
            size = 4 * parameter_count(self.network.shapes()) * len(self.power_ema) / 2**30
            total, every = self.batches // self.ema_snapshot_every * size, f"{self.ema_snapshot_every:,}"
            return f"EMA snapshots: widths {widths} every {every} batches, {size:.2g} GiB each, {total:.2g} GiB in all."
        if len(self.power_ema) < 2 or self.objective.replaces_teacher:
            return ""
        return f"EMA snapshots: none, so that only widths {widths} will be available (--ema-snapshot-every N)."

    @property
    def sampled_ema(self) -> str:
        """Name of the EMA to sample from, or PARAMETERS."""
        asked = self.evaluation.ema if self.evaluation else ""
        if name := EMAName.parse(asked):
            return PARAMETERS if name.kind == NONE else f"{name.kind}_{name.value!r}"
        return asked or next((ema.name for ema in self.emas), PARAMETERS)
