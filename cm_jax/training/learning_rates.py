"""Learning rates as functions of the step."""

import abc
import dataclasses
import math

import jax.numpy as jnp
import optax

from cm_jax.diffusion.curricula import StepSchedule
from cm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LearningRate(abc.ABC):
    """A linear warm-up from zero to `peak`, then what each kind does."""

    peak: float = 1e-4
    warm_up: int = 0
    """Steps in which the rate rises; the first of them has peak / warm_up."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf or self.warm_up < 0:
            raise InputError(f"A learning rate needs a positive peak and a warm-up of 0 steps or more; got {self}.")

    def schedule(self) -> optax.Schedule:
        """k -> the rate of the step after k steps; k may be traced."""
        after = self.after_warm_up()
        if not self.warm_up:
            return after
        rising = optax.linear_schedule(self.peak / self.warm_up, self.peak, max(1, self.warm_up - 1))
        return optax.join_schedules([rising, after], [self.warm_up])

    @abc.abstractmethod
    def after_warm_up(self) -> optax.Schedule: ...


@dataclasses.dataclass(frozen=True)
class ConstantRate(LearningRate):
    """The peak ever after: all of CM, iCT and ECT for CIFAR-10."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.constant_schedule(self.peak)


@dataclasses.dataclass(frozen=True)
class LinearDecay(LearningRate, StepSchedule):
    """Down to zero in a straight line, `steps` after the warm-up."""

    steps: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand_steps(self, self.steps)

    @property
    def duration(self) -> int:
        return self.warm_up + self.steps

    def after_warm_up(self) -> optax.Schedule:
        return optax.linear_schedule(self.peak, 0.0, self.steps)


@dataclasses.dataclass(frozen=True)
class CosineDecay(LearningRate, StepSchedule):
    """Down to zero along a half cosine, `steps` after the warm-up."""

    steps: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand_steps(self, self.steps)

    @property
    def duration(self) -> int:
        return self.warm_up + self.steps

    def after_warm_up(self) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.peak, self.steps)


@dataclasses.dataclass(frozen=True)
class InverseRootDecay(LearningRate):
    """peak / sqrt(max(1, k / steps)), with k counted from the end of the warm-up (EDM2, ECT and sCM for ImageNet)."""

    steps: int = 35_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand_steps(self, self.steps)

    def after_warm_up(self) -> optax.Schedule:
        return lambda count: self.peak / jnp.sqrt(jnp.maximum(1.0, count / self.steps))


AnyLearningRate = ConstantRate | LinearDecay | CosineDecay | InverseRootDecay


def _demand_steps(rate: LearningRate, steps: int) -> None:
    if steps < 1:
        raise InputError(f"The learning rate decays in 1 step or more, got {rate}.")
