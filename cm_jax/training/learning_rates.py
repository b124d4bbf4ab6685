"""Learning-rate schedules."""

import abc
import dataclasses
import math

import jax.numpy as jnp
import optax

from cm_jax.diffusion.curricula import StepSchedule
from cm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LearningRate(abc.ABC):
    """Linear warm-up from zero to `peak`, then the schedule of the subclass."""

    peak: float = 1e-4
    """Largest learning rate."""
    warm_up: int = 0
    """Warm-up steps; the first has rate peak / warm_up."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf or self.warm_up < 0 or getattr(self, "steps", 1) < 1:
            raise InputError(f"Expected a learning rate with peak > 0, warm_up >= 0 and steps >= 1, got {self}.")

    def schedule(self) -> optax.Schedule:
        """k -> learning rate after k steps; k may be traced."""
        after = self.after_warm_up()
        if not self.warm_up:
            return after
        rising = optax.linear_schedule(self.peak / self.warm_up, self.peak, max(1, self.warm_up - 1))
        return optax.join_schedules([rising, after], [self.warm_up])

    @abc.abstractmethod
    def after_warm_up(self) -> optax.Schedule: ...


@dataclasses.dataclass(frozen=True)
class ConstantRate(LearningRate):
    """Constant at the peak: CM, iCT, and ECT for CIFAR-10."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.constant_schedule(self.peak)


@dataclasses.dataclass(frozen=True)
class _FiniteDecay(LearningRate, StepSchedule):
    steps: int = 100_000
    """Steps from the end of the warm-up until the rate is zero."""

    @property
    def duration(self) -> int:
        return self.warm_up + self.steps


@dataclasses.dataclass(frozen=True)
class LinearDecay(_FiniteDecay):
    """Linear decay to zero."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.linear_schedule(self.peak, 0.0, self.steps)


@dataclasses.dataclass(frozen=True)
class CosineDecay(_FiniteDecay):
    """Half-cosine decay to zero."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.peak, self.steps)


@dataclasses.dataclass(frozen=True)
class InverseRootDecay(LearningRate):
    """peak / sqrt(max(1, k / steps)), with k counted from the end of the warm-up (EDM2; ECT and sCM on ImageNet)."""

    steps: int = 35_000
    """Steps at the peak."""

    def after_warm_up(self) -> optax.Schedule:
        return lambda count: self.peak / jnp.sqrt(jnp.maximum(1.0, count / self.steps))


AnyLearningRate = ConstantRate | LinearDecay | CosineDecay | InverseRootDecay
