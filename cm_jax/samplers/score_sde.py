"""The samplers of Score SDE's VP and VE: steps in a time t with noise schedule sigma(t) and scaling s(t)."""

import abc
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.ode import dx_dsigma, euler_step, heun_step
from cm_jax.samplers.base import Levels, Sampler, scan_steps
from cm_jax.types import Denoiser, Images, NoiseSource


class ScheduleInTime(abc.ABC):
    """sigma(t) and s(t): at time t the images are s(t) (x_0 + sigma(t) z)."""

    @abc.abstractmethod
    def time(self, sigma: Any) -> Any:
        """t(sigma), with t(0) = 0."""

    @abc.abstractmethod
    def sigma(self, t: Any) -> Any: ...

    @abc.abstractmethod
    def dsigma_dt(self, t: Any) -> Any: ...

    @abc.abstractmethod
    def scale(self, sigma: Any) -> Any:
        """s as a function of sigma."""

    @abc.abstractmethod
    def dscale_dsigma(self, sigma: Any) -> Any: ...

    @abc.abstractmethod
    def levels(self, steps: int) -> np.ndarray:
        """The method's own noise levels, float64 [steps]."""


@dataclasses.dataclass(frozen=True)
class VPSchedule(ScheduleInTime):
    """sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 and s = 1 / sqrt(1 + sigma^2), at equal steps of t from 1."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float) -> "VPSchedule":
        """The schedule with sigma(1e-3) = sigma_min and sigma(1) = sigma_max."""
        low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
        beta_d = 2 * (high - low / _FIRST_TIME) / (1 - _FIRST_TIME)
        return cls(float(beta_d), float(high - beta_d / 2))

    def time(self, sigma):
        log = jnp.log1p(sigma**2)
        return 2 * log / (jnp.sqrt(self.beta_min**2 + 2 * self.beta_d * log) + self.beta_min)

    def sigma(self, t):
        return jnp.sqrt(jnp.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def dsigma_dt(self, t):
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma) / 2

    def scale(self, sigma):
        return 1 / jnp.sqrt(1 + sigma**2)

    def dscale_dsigma(self, sigma):
        return -sigma * self.scale(sigma) ** 3

    def levels(self, steps):
        t = np.linspace(1, _FIRST_TIME, steps)
        return np.sqrt(np.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))


_FIRST_TIME = 1e-3
"""The lowest time at which VP's network is called."""


@dataclasses.dataclass(frozen=True)
class VESchedule(ScheduleInTime):
    """sigma(t)^2 = t and s = 1, at geometrically spaced levels."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def time(self, sigma):
        return sigma**2

    def sigma(self, t):
        return jnp.sqrt(t)

    def dsigma_dt(self, t):
        return 0.5 / jnp.sqrt(t)

    def scale(self, sigma):
        return jnp.ones_like(sigma)

    def dscale_dsigma(self, sigma):
        return jnp.zeros_like(sigma)

    def levels(self, steps):
        return np.geomspace(self.sigma_max, self.sigma_min, steps)


@dataclasses.dataclass(frozen=True)
class ScoreSDE(Sampler):
    """The probability-flow ODE in time t, with a schedule and scaling: EDM, algorithm 1.

    dx/dt = s'(t) y + s(t) sigma'(t) (y - D(y, sigma)) / sigma with y = x / s(t).
    """

    schedule: VPSchedule | VESchedule = VPSchedule()
    solver: Literal["euler", "heun"] = "euler"

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        return tuple(map(float, self.schedule.levels(steps)))

    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images:
        schedule, bounded = self.schedule, self.clipped(denoiser)

        def derivative(x: Images, t: Any) -> Images:
            sigma, rate = schedule.sigma(t), schedule.dsigma_dt(t)
            y, scale = x / schedule.scale(sigma), schedule.scale(sigma)
            return rate * (schedule.dscale_dsigma(sigma) * y + scale * dx_dsigma(bounded, y, sigma))

        def step(x, index, now, after):
            t, r = schedule.time(now), schedule.time(after)
            if self.solver == "euler":
                return euler_step(derivative, x, t, r)
            return heun_step(derivative, x, t, r, correct=after > 0)

        start = schedule.scale(levels[0]) * levels[0] * noise(0)
        return self.bounded(scan_steps(step, start, levels) / schedule.scale(levels[-1]))
