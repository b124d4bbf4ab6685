"""The interface of samplers."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.ode import Derivative, dx_dsigma
from cm_jax.types import Denoiser, Images, NoiseSource, Sigmas

Levels = Float[Array, " n"]
"""Descending noise levels with the final one: n - 1 steps."""
Level = Float[Array, ""]
"""One noise level for the whole batch."""


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """sampler(denoiser, levels, noise) -> images in [-1, 1].

    noise(0) is the initial noise, of standard deviation 1; noise(i + 1) belongs to step i, in the order of OpenAI's
    random numbers. `clip` clips every denoised image to [-1, 1], as OpenAI's samplers do by default.
    """

    clip: bool = True

    ends_at_boundary: ClassVar[bool] = False
    """Whether it ends at sigma_min, where consistency functions are the identity. Tuned timesteps need this."""

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        """The default noise levels of `steps` steps for a model of `num_levels` levels, with the final level."""
        del num_levels
        return (*map(float, schedule.descending(steps)), self.final_level(schedule))

    def final_level(self, schedule: KarrasSchedule) -> float:
        """The level after the last step."""
        return schedule.sigma_min if self.ends_at_boundary else 0.0

    def num_noise_samples(self, steps: int) -> int:
        """The number of noise samples in `steps` steps, with the initial one."""
        del steps
        return 1

    @abc.abstractmethod
    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images: ...

    def clipped(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser with its images clipped to [-1, 1] if `clip` is set."""

        def clip(x: Images, sigma: Sigmas) -> Images:
            return jnp.clip(denoiser(x, sigma), -1, 1)

        return clip if self.clip else denoiser


class ODESampler(Sampler, abc.ABC):
    """A sampler whose steps follow dx/dsigma of the probability-flow ODE."""

    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images:
        derivative, steps = functools.partial(dx_dsigma, self.clipped(denoiser)), levels.shape[0] - 1

        def step(x: Images, index: Any, now: Level, after: Level) -> Images:
            return self.step(derivative, x, now, after, steps, lambda: noise(index + 1))

        return jnp.clip(scan_steps(step, levels[0] * noise(0), levels), -1, 1)

    @abc.abstractmethod
    def step(
        self,
        derivative: Derivative[Images],
        x: Images,
        now: Level,
        after: Level,
        steps: int,
        noise: Callable[[], Images],
    ) -> Images:
        """x at the level `after`, from x at the level `now`, in one of `steps` steps."""


def scan_steps(step: Callable[[Images, Any, Level, Level], Images], x: Images, levels: Levels) -> Images:
    """x after step(x, i, s_i, s_{i+1}) for every pair of consecutive levels; i is traced."""

    def body(x: Images, interval: tuple[Any, Level, Level]) -> tuple[Images, None]:
        return step(x, *interval), None

    return jax.lax.scan(body, x, (jnp.arange(levels.shape[0] - 1), levels[:-1], levels[1:]))[0]
