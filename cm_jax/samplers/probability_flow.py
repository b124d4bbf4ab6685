"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, from sigma_max down to 0 (EDM)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.errors import InputError
from cm_jax.samplers.base import Level, Levels, Sampler, intervals
from cm_jax.types import Denoiser, Images, NoiseSource


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise added before every step, to forget the errors made so far (EDM, algorithm 2). The default adds none."""

    amount: float = 0.0
    """S_churn, shared over all steps; a step's level grows by at most sqrt(2)."""
    sigma_min: float = 0.0
    """Levels below this one are left alone (S_tmin) ..."""
    sigma_max: float = math.inf
    """... and levels above this one (S_tmax)."""
    noise: float = 1.0
    """Standard deviation of the noise (S_noise)."""

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.noise < math.inf and self.sigma_min <= self.sigma_max):
            raise InputError(f"Churn needs amount and noise of 0 or more and sigma_min <= sigma_max; got {self}.")

    def __call__(self, x: Images, level: Level, steps: int, noise: Images) -> tuple[Images, Level]:
        """(x, level), both raised for one of `steps` steps."""
        most = min(self.amount / steps, math.sqrt(2) - 1)
        growth = jnp.where((self.sigma_min <= level) & (level <= self.sigma_max), most, 0.0)
        higher = level * (1 + growth)
        return x + noise * self.noise * jnp.sqrt((higher - level) * (higher + level)), higher


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Second-order steps (EDM, algorithm 2); 2N - 1 calls of the denoiser for N steps, the last one being Euler's."""

    churn: Churn = Churn()

    def draws(self, steps: int) -> int:
        return steps + 1 if self.churn.amount else 1

    def __call__(self, denoiser: Denoiser, levels: Levels, draw: NoiseSource) -> Images:
        slope = self.slope(denoiser)

        def step(x, interval):
            index, now, after = interval
            if self.churn.amount:
                x, now = self.churn(x, now, levels.shape[0] - 1, draw(index + 1))
            first = slope(x, now)
            euler = x + (after - now) * first
            return jax.lax.cond(
                after > 0, lambda: x + (after - now) * (first + slope(euler, after)) / 2, lambda: euler
            ), None

        x, _ = jax.lax.scan(step, levels[0] * draw(0), intervals(levels))
        return jnp.clip(x, -1, 1)


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """First-order steps: x + (s_{i+1} - s_i) dx/dsigma."""

    def __call__(self, denoiser: Denoiser, levels: Levels, draw: NoiseSource) -> Images:
        slope = self.slope(denoiser)

        def step(x, interval):
            _, now, after = interval
            return x + (after - now) * slope(x, now), None

        x, _ = jax.lax.scan(step, levels[0] * draw(0), intervals(levels))
        return jnp.clip(x, -1, 1)


@dataclasses.dataclass(frozen=True)
class ProgressiveEuler(Euler):
    """Euler's steps on N intervals that end at sigma_min, as progressively distilled models were trained to take."""

    ends_at_boundary: ClassVar[bool] = True

    def levels(self, steps: int, grid: KarrasGrid) -> tuple[float, ...]:
        return tuple(map(float, grid.descending(steps + 1)))


@dataclasses.dataclass(frozen=True)
class DPM(Sampler):
    """Second-order steps through the middle level ((s_i^(1/3) + s_{i+1}^(1/3)) / 2)^3; two calls a step."""

    churn: Churn = Churn()

    def draws(self, steps: int) -> int:
        return steps + 1 if self.churn.amount else 1

    def __call__(self, denoiser: Denoiser, levels: Levels, draw: NoiseSource) -> Images:
        slope = self.slope(denoiser)

        def step(x, interval):
            index, now, after = interval
            if self.churn.amount:
                x, now = self.churn(x, now, levels.shape[0] - 1, draw(index + 1))
            middle = ((jnp.cbrt(now) + jnp.cbrt(after)) / 2) ** 3
            halfway = x + (middle - now) * slope(x, now)
            return x + (after - now) * slope(halfway, middle), None

        x, _ = jax.lax.scan(step, levels[0] * draw(0), intervals(levels))
        return jnp.clip(x, -1, 1)
