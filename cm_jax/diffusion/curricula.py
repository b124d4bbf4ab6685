"""Curricula: what changes with the training step k. N(k), mu(k), ECT's gap and sCM's warm-up.

Each is a frozen dataclass, called with k. The step may be traced, so that a whole curriculum compiles once. N(k) is
exact: it is decided by integers, because in single precision the original's roots fall on the wrong side of whole
numbers.
"""

import abc
import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cm_jax.errors import InputError
from cm_jax.types import Sigmas

Step = int | Int[Array, ""]
"""The number k of optimiser steps taken before this one."""
Count = Int[Array, ""]
Rate = Float[Array, ""]


def _demand(met: bool, setting: object, wanted: str) -> None:
    if not met:
        raise InputError(f"{setting} is not a schedule: it needs {wanted}.")


class Curriculum(abc.ABC):
    """N(k), the number of noise levels (of steps, for progressive distillation)."""

    @abc.abstractmethod
    def __call__(self, step: Step) -> Count: ...


@dataclasses.dataclass(frozen=True)
class Constant(Curriculum):
    """The same N at every step: 40 for ImageNet and LSUN, 18 for CIFAR-10 (CM, appendix C)."""

    levels: int = 40

    def __post_init__(self) -> None:
        _demand(self.levels >= 2, self, "levels >= 2")

    def __call__(self, step: Step) -> Count:
        del step
        return jnp.int32(self.levels)


@dataclasses.dataclass(frozen=True)
class Progressive(Curriculum):
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 for K steps, then s1 + 1 (CM, appendix C).

    The first number is held at 1 from below, so N is never less than 2.
    """

    start: int = 2
    """s0."""
    end: int = 200
    """s1; training ends at s1 + 1 levels."""
    steps: int = 800_000
    """K."""

    def __post_init__(self) -> None:
        _demand(1 <= self.start <= self.end and self.steps >= 1, self, "1 <= start <= end and steps >= 1")

    @property
    def lasts(self) -> int:
        """Steps until nothing changes any more."""
        return self.steps

    def __call__(self, step: Step) -> Count:
        """One more than m, the least whole number with K ((m + 1)^2 - s0^2) >= k ((s1 + 1)^2 - s0^2)."""
        growth = (self.end + 1) ** 2 - self.start**2
        last = [self.steps * ((m + 1) ** 2 - self.start**2) // growth for m in range(1, self.end)]
        return 2 + jnp.searchsorted(np.asarray(last, np.int32), step, side="left").astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Doubling(Curriculum):
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)) (iCT, section 3.4)."""

    start: int = 10
    end: int = 1280
    steps: int = 400_000

    def __post_init__(self) -> None:
        _demand(1 <= self.start <= self.end and self.steps_per_stage >= 1, self, "1 <= start <= end, a step a stage")

    @property
    def steps_per_stage(self) -> int:
        """K'."""
        return math.floor(self.steps / (math.log2(self.end // self.start) + 1))

    @property
    def lasts(self) -> int:
        """Steps until nothing changes any more."""
        return self.steps_per_stage * ((self.end - 1) // self.start).bit_length()

    def __call__(self, step: Step) -> Count:
        doublings = (self.end // self.start).bit_length()
        stages = [min(self.start * 2**stage, self.end) + 1 for stage in range(doublings + 1)]
        return _at(stages, step // self.steps_per_stage)


@dataclasses.dataclass(frozen=True)
class Halving(Curriculum):
    """N(k) halves every P steps down to 2, which lasts 2 P steps, and then is 1 (progressive distillation)."""

    start: int = 64
    steps_per_stage: int = 50_000
    """P."""

    def __post_init__(self) -> None:
        whole = self.start >= 2 and self.start & (self.start - 1) == 0
        _demand(whole and self.steps_per_stage >= 1, self, "start a power of 2 and steps_per_stage >= 1")

    @property
    def lasts(self) -> int:
        """Steps until nothing changes any more."""
        return self.steps_per_stage * self.start.bit_length()

    def __call__(self, step: Step) -> Count:
        halvings = self.start.bit_length() - 1
        stages = [self.start >> stage for stage in range(halvings)]
        return _at([*stages, 2, 1], step // self.steps_per_stage)


class TargetEMA(abc.ABC):
    """mu(k), with which the target follows the student: target <- mu target + (1 - mu) student."""

    @abc.abstractmethod
    def __call__(self, step: Step) -> Rate: ...


@dataclasses.dataclass(frozen=True)
class ConstantTargetEMA(TargetEMA):
    """The same mu at every step; 0 makes the student its own target."""

    rate: float = 0.95

    def __post_init__(self) -> None:
        _demand(0 <= self.rate <= 1, self, "0 <= rate <= 1")

    def __call__(self, step: Step) -> Rate:
        del step
        return jnp.float32(self.rate)


@dataclasses.dataclass(frozen=True)
class AdaptiveTargetEMA(TargetEMA):
    """mu(k) = exp(s0 ln mu0 / (N(k) - 1)), or with N(k) below, as the paper prints it (CM, appendix C)."""

    curriculum: Progressive = Progressive()
    start: float = 0.95
    """mu0."""
    over: Literal["intervals", "levels"] = "intervals"
    """intervals: divided by N - 1, as both of the original's programs do. levels: by N, as the paper prints it."""

    def __post_init__(self) -> None:
        _demand(0 < self.start < 1, self, "0 < start < 1")

    def __call__(self, step: Step) -> Rate:
        levels = self.curriculum(step)
        divisor = levels - 1 if self.over == "intervals" else levels
        return jnp.exp(self.curriculum.start * math.log(self.start) / divisor)


@dataclasses.dataclass(frozen=True)
class ShrinkingGap:
    """ECT's mapping from t to the cleaner level r of its pair, at stage a = floor(k / steps_per_stage).

    r = max(0, t (1 - n(t) / q^(a + 1))) with n(t) = 1 + slope sigmoid(-decay t) (ECT).
    """

    ratio: float = 2.0
    """q: by how much the gap shrinks from stage to stage."""
    slope: float = 8.0
    """k in the paper, which is a step here."""
    decay: float = 1.0
    """b in the paper."""
    steps_per_stage: int = 25_000
    stages: int = 8

    def __post_init__(self) -> None:
        _demand(
            self.ratio > 1 and self.slope >= 0 and self.steps_per_stage >= 1 and self.stages >= 1,
            self,
            "ratio > 1, slope >= 0, steps_per_stage >= 1 and stages >= 1",
        )

    @property
    def lasts(self) -> int:
        """Steps until nothing changes any more."""
        return self.steps_per_stage * (self.stages - 1)

    def __call__(self, t: Sigmas, step: Step) -> Sigmas:
        scale = _at([self.ratio ** -(stage + 1) for stage in range(self.stages)], step // self.steps_per_stage)
        n = 1 + self.slope / (1 + jnp.exp(self.decay * t))
        return jnp.maximum(0, t * (1 - n * scale))


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """min(1, k / H): how much of the tangent's unstable part sCM lets in (sCM)."""

    steps: int = 10_000
    """H."""

    def __post_init__(self) -> None:
        _demand(self.steps >= 1, self, "steps >= 1")

    @property
    def lasts(self) -> int:
        """Steps until nothing changes any more."""
        return self.steps

    def __call__(self, step: Step) -> Rate:
        return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / self.steps)


def _at(stages: list, stage: Step) -> Array:
    """The value of a stage; the last one is held."""
    return jnp.asarray(stages)[jnp.minimum(stage, len(stages) - 1)]
