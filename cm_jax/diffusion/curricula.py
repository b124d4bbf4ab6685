"""Curricula: quantities that depend on the training step k. N(k), mu(k), ECT's gap and sCM's warm-up.

Each is a frozen dataclass called with k. The step may be traced, so a whole curriculum compiles once. N(k) is exact:
integer arithmetic decides it, because single-precision roots can fall on the wrong side of an integer.
"""

import abc
import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cm_jax.errors import InputError
from cm_jax.types import Sigmas

Step = int | Int[Array, ""]
"""The number k of optimizer steps taken before this one."""
Count = Int[Array, ""]
Rate = Float[Array, ""]


def _require(met: bool, settings: object, expected: str) -> None:
    if not met:
        raise InputError(f"Expected {expected}, got {settings}.")


class StepSchedule(abc.ABC):  # noqa: B024  not instantiated, but every method has a default
    """A value that changes during the first `duration` steps of training."""

    LENGTH_FIELD: ClassVar[str] = "steps"
    """The field to change where `duration` is longer than a run."""

    @property
    def duration(self) -> int:
        """Steps after which the value no longer changes."""
        return getattr(self, self.LENGTH_FIELD)


class Curriculum(StepSchedule, abc.ABC):
    """N(k), the number of noise levels (the number of sampling steps, for progressive distillation)."""

    @property
    def final(self) -> int:
        """N after `duration` steps."""
        return int(self(self.duration))

    @abc.abstractmethod
    def __call__(self, step: Step) -> Count: ...


@dataclasses.dataclass(frozen=True)
class Constant(Curriculum):
    """The same N at every step: 40 for ImageNet and LSUN, 18 for CIFAR-10 (CM, appendix C)."""

    num_levels: int = 40
    """Number of noise levels N."""

    def __post_init__(self) -> None:
        _require(self.num_levels >= 2, self, "num_levels >= 2")

    @property
    def duration(self) -> int:
        return 0

    def __call__(self, step: Step) -> Count:
        return jnp.int32(self.num_levels)


@dataclasses.dataclass(frozen=True)
class Progressive(Curriculum):
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 for K steps, then s1 + 1 (CM, appendix C).

    The ceiling is at least 1, so N is at least 2.
    """

    start: int = 2
    """s0."""
    end: int = 200
    """s1; training ends at s1 + 1 levels."""
    steps: int = 800_000
    """K."""

    def __post_init__(self) -> None:
        _require(1 <= self.start <= self.end and self.steps >= 1, self, "1 <= start <= end and steps >= 1")

    def __call__(self, step: Step) -> Count:
        """One more than m, the smallest integer with K ((m + 1)^2 - s0^2) >= k ((s1 + 1)^2 - s0^2)."""
        growth = (self.end + 1) ** 2 - self.start**2
        last = [self.steps * ((m + 1) ** 2 - self.start**2) // growth for m in range(1, self.end)]
        return 2 + jnp.searchsorted(np.asarray(last, np.int32), step, side="left").astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Doubling(Curriculum):
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)) (iCT, section 3.4)."""

    start: int = 10
    """s0."""
    end: int = 1280
    """s1."""
    steps: int = 400_000
    """K."""

    def __post_init__(self) -> None:
        met = 1 <= self.start <= self.end and self.steps_per_stage >= 1
        _require(met, self, "1 <= start <= end and at least one step per stage")

    @property
    def steps_per_stage(self) -> int:
        """K'."""
        return math.floor(self.steps / (math.log2(self.end // self.start) + 1))

    @property
    def duration(self) -> int:
        return self.steps_per_stage * ((self.end - 1) // self.start).bit_length()

    def __call__(self, step: Step) -> Count:
        doublings = (self.end // self.start).bit_length()
        stages = [min(self.start * 2**stage, self.end) + 1 for stage in range(doublings + 1)]
        return _at(stages, step // self.steps_per_stage)


@dataclasses.dataclass(frozen=True)
class Halving(Curriculum):
    """N(k) halves every P steps down to 2, stays there for 2 P steps, and is then 1 (progressive distillation)."""

    start: int = 64
    """Sampling steps of the first stage."""
    steps_per_stage: int = 50_000
    """P, the training steps of each stage."""

    LENGTH_FIELD: ClassVar[str] = "steps_per_stage"

    def __post_init__(self) -> None:
        power_of_2 = self.start >= 2 and self.start & (self.start - 1) == 0
        _require(power_of_2 and self.steps_per_stage >= 1, self, "start a power of 2 and steps_per_stage >= 1")

    @property
    def duration(self) -> int:
        return self.steps_per_stage * self.start.bit_length()

    def __call__(self, step: Step) -> Count:
        halving = [self.start >> stage for stage in range(self.start.bit_length() - 1)]
        return _at([*halving, 2, 1], step // self.steps_per_stage)


AnyCurriculum = Constant | Progressive | Doubling | Halving | Curriculum


class TargetEMA(abc.ABC):
    """mu(k) of the target's update: target <- mu target + (1 - mu) student."""

    def check(self, curriculum: Curriculum | None) -> None:
        """Raise InputError for an objective's curriculum that it cannot follow."""
        del curriculum

    @abc.abstractmethod
    def __call__(self, step: Step, curriculum: Curriculum | None) -> Rate: ...


@dataclasses.dataclass(frozen=True)
class ConstantTargetEMA(TargetEMA):
    """The same mu at every step; 0 makes the student its own target."""

    decay: float = 0.95
    """mu."""

    def __post_init__(self) -> None:
        _require(0 <= self.decay <= 1, self, "0 <= decay <= 1")

    def __call__(self, step: Step, curriculum: Curriculum | None = None) -> Rate:
        return jnp.float32(self.decay)


@dataclasses.dataclass(frozen=True)
class AdaptiveTargetEMA(TargetEMA):
    """mu(k) = exp(s0 ln mu0 / (N(k) - 1)), s0 and N(k) of the objective's Progressive curriculum (CM, appendix C)."""

    start: float = 0.95
    """mu0."""
    over: Literal["intervals", "levels"] = "intervals"
    """intervals: N - 1, as in OpenAI's two implementations. levels: N, as the paper prints it."""

    def __post_init__(self) -> None:
        _require(0 < self.start < 1, self, "0 < start < 1")

    def check(self, curriculum: Curriculum | None) -> None:
        _progressive(curriculum)

    def __call__(self, step: Step, curriculum: Curriculum | None) -> Rate:
        curriculum = _progressive(curriculum)
        divisor = curriculum(step) - 1 if self.over == "intervals" else curriculum(step)
        return jnp.exp(curriculum.start * math.log(self.start) / divisor)


def _progressive(curriculum: Curriculum | None) -> Progressive:
    if not isinstance(curriculum, Progressive):
        found = "no curriculum" if curriculum is None else f"a {type(curriculum).__name__} curriculum"
        raise InputError(
            f"AdaptiveTargetEMA follows a Progressive curriculum, and the objective has {found}; use ConstantTargetEMA."
        )
    return curriculum


AnyTargetEMA = ConstantTargetEMA | AdaptiveTargetEMA | TargetEMA


@dataclasses.dataclass(frozen=True)
class ShrinkingGap(StepSchedule):
    """ECT's map from t to the cleaner level r of its pair, at stage a = floor(k / steps_per_stage).

    r = max(0, t (1 - n(t) / q^(a + 1))) with n(t) = 1 + slope sigmoid(-decay t) (ECT).
    """

    ratio: float = 2.0
    """q, the factor by which the gap shrinks in each stage."""
    slope: float = 8.0
    """k in the paper: n(t) decreases from 1 + slope / 2 at t = 0 to 1 for large t."""
    decay: float = 1.0
    """b in the paper: how fast n(t) decreases."""
    steps_per_stage: int = 25_000
    """Training steps of each stage."""
    stages: int = 8
    """Number of stages; the last one lasts until the end of training."""

    LENGTH_FIELD: ClassVar[str] = "steps_per_stage"

    def __post_init__(self) -> None:
        met = self.ratio > 1 and self.slope >= 0 and self.steps_per_stage >= 1 and self.stages >= 1
        _require(met, self, "ratio > 1, slope >= 0, steps_per_stage >= 1 and stages >= 1")

    @property
    def duration(self) -> int:
        return self.steps_per_stage * (self.stages - 1)

    def __call__(self, t: Sigmas, step: Step) -> Sigmas:
        scale = _at([self.ratio ** -(stage + 1) for stage in range(self.stages)], step // self.steps_per_stage)
        n = 1 + self.slope / (1 + jnp.exp(self.decay * t))
        return jnp.maximum(0, t * (1 - n * scale))


@dataclasses.dataclass(frozen=True)
class WarmUp(StepSchedule):
    """min(1, k / H), the factor of the unstable part of the tangent (sCM)."""

    steps: int = 10_000
    """H."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, self, "steps >= 1")

    def __call__(self, step: Step) -> Rate:
        return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / self.steps)


def _at(stages: list, stage: Step) -> Array:
    """The value of a stage; later stages have the last value."""
    return jnp.asarray(stages)[jnp.minimum(stage, len(stages) - 1)]
