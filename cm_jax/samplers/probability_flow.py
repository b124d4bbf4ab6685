"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma (EDM), and the ancestral sampler."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.ode import Derivative, dx_dsigma, euler_step, heun_step
from cm_jax.diffusion.preconditioning import Preconditioning
from cm_jax.errors import InputError
from cm_jax.samplers.base import Level, Levels, Sampler, scan_steps
from cm_jax.types import Denoiser, Images, NoiseSource

RoundSigma = Callable[[Any], Any]
"""sigma -> the nearest level at which the network is defined."""


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise added before each step, which reduces accumulated errors (EDM, algorithm 2). The default adds none."""

    amount: float = 0.0
    """S_churn, divided among all steps; the level increases by at most a factor of sqrt(2) per step."""
    sigma_min: float = 0.0
    """Lowest level at which noise is added (S_tmin)."""
    sigma_max: float = math.inf
    """Highest level at which noise is added (S_tmax)."""
    noise: float = 1.0
    """Standard deviation of the noise (S_noise)."""

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.noise < math.inf and self.sigma_min <= self.sigma_max):
            raise InputError(f"Expected finite amount >= 0 and noise >= 0, and sigma_min <= sigma_max; got {self}.")

    def __call__(
        self, x: Images, level: Level, steps: int, noise: Images, round_sigma: RoundSigma | None = None
    ) -> tuple[Images, Level]:
        """x and its level after noise is added, in one of `steps` steps; the new level is rounded by `round_sigma`."""
        most = min(self.amount / steps, math.sqrt(2) - 1)
        growth = jnp.where((self.sigma_min <= level) & (level <= self.sigma_max), most, 0.0)
        higher = level * (1 + growth)
        if round_sigma is not None:
            higher = jnp.where(growth > 0, round_sigma(higher), level)
        return x + noise * self.noise * jnp.sqrt((higher - level) * (higher + level)), higher


class ODESampler(Sampler, abc.ABC):
    """A sampler whose steps follow dx/dsigma of the probability-flow ODE."""

    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images:
        derivative, steps = functools.partial(dx_dsigma, self.clipped(denoiser)), levels.shape[0] - 1

        def step(x: Images, index: Any, now: Level, after: Level) -> Images:
            return self.step(derivative, x, now, after, steps, lambda: noise(index + 1))

        return self.bounded(scan_steps(step, levels[0] * noise(0), levels))

    @abc.abstractmethod
    def step(
        self, derivative: Derivative, x: Images, now: Level, after: Level, steps: int, noise: Callable[[], Images]
    ) -> Images:
        """x at the level `after`, from x at the level `now`, in one of `steps` steps."""


class Euler(ODESampler):
    """First-order steps; one call of the denoiser per step."""

    def step(self, derivative, x, now, after, steps, noise):
        return euler_step(derivative, x, now, after)


class ProgressiveEuler(Euler):
    """Euler steps on N intervals that end at sigma_min, as progressively distilled models are trained."""

    ends_at_boundary: ClassVar[bool] = True

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        return tuple(map(float, schedule.descending(steps + 1)[:-1]))

    def final_level(self, schedule: KarrasSchedule, boundary: float) -> float:
        return schedule.sigma_min


@dataclasses.dataclass(frozen=True)
class _Churned(ODESampler):
    """Solver steps, each after noise is added."""

    churn: Churn = Churn()
    preconditioning: Preconditioning | None = dataclasses.field(default=None, repr=False)
    """Rounds the level after churn, for models with discrete noise levels. Set by `for_model`."""

    def for_model(self, function: ConsistencyFunction) -> Sampler:
        return dataclasses.replace(self, preconditioning=function.preconditioning) if self.churn.amount else self

    def num_noise_samples(self, steps: int) -> int:
        return steps + 1 if self.churn.amount else 1

    def step(self, derivative, x, now, after, steps, noise):
        if self.churn.amount:
            rounding = self.preconditioning and self.preconditioning.round_sigma
            x, now = self.churn(x, now, steps, noise(), rounding)
        return self.solve(derivative, x, now, after)

    @abc.abstractmethod
    def solve(self, derivative: Derivative, x: Images, now: Level, after: Level) -> Images:
        """One step of the solver."""


class Heun(_Churned):
    """Second-order steps (EDM, algorithm 2): 2N - 1 calls of the denoiser for N steps; the last step is Euler's."""

    def solve(self, derivative, x, now, after):
        return heun_step(derivative, x, now, after, correct=after > 0)


class DPM(_Churned):
    """Second-order steps through the middle level ((s_i^(1/3) + s_{i+1}^(1/3)) / 2)^3; two calls per step."""

    def solve(self, derivative, x, now, after):
        middle = ((jnp.cbrt(now) + jnp.cbrt(after)) / 2) ** 3
        return x + (after - now) * derivative(euler_step(derivative, x, now, middle), middle)


class Ancestral(ODESampler):
    """An Euler step to s_down = s_{i+1}^2 / s_i, then noise: s_up^2 = s_{i+1}^2 (s_i^2 - s_{i+1}^2) / s_i^2."""

    def num_noise_samples(self, steps: int) -> int:
        return steps + 1

    def step(self, derivative, x, now, after, steps, noise):
        up = after * jnp.sqrt((now - after) * (now + after)) / now
        return euler_step(derivative, x, now, after**2 / now) + up * noise()
