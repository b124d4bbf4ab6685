"""Samplers of consistency functions: in one step, or in several with new noise in between."""

from typing import ClassVar

import jax.numpy as jnp

from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.samplers.base import Levels, Sampler, scan_steps
from cm_jax.types import Denoiser, Images, NoiseSource


class Consistency(Sampler):
    """x_0 = f(x, s_i), then x = x_0 + sqrt(s_{i+1}^2 - sigma_min^2) z: CM, algorithm 1. One step is f(s_0 z, s_0)."""

    ends_at_boundary: ClassVar[bool] = True

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        """Levels of indices 0, q, 2q, ... with q = num_levels // steps, as in diffusers.

        For more steps than levels it is the schedule with N = steps.
        """
        if steps > num_levels:
            return super().levels(steps, schedule, num_levels)
        indices = [step * (num_levels // steps) for step in range(steps)]
        return (*(float(schedule.sigma(index, num_levels)) for index in indices), self.final_level(schedule))

    def num_noise_samples(self, steps: int) -> int:
        return 1 if steps == 1 else steps + 1

    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images:
        denoiser, x = self.clipped(denoiser), levels[0] * noise(0)
        if levels.shape[0] == 2:
            return jnp.clip(denoiser(x, jnp.full(x.shape[0], levels[0])), -1, 1)
        return jnp.clip(multistep_sample(denoiser, x, levels, noise), -1, 1)


def multistep_sample(denoiser: Denoiser, x: Images, levels: Levels, noise: NoiseSource) -> Images:
    """CM, algorithm 1 from x at the first level: denoise, add new noise of the next level, and so on; no clipping.

    The last level is sigma_min, at which no noise is added: the result is the last denoised image.
    """

    def step(x, index, now, after):
        clean = denoiser(x, jnp.full(x.shape[0], now))
        return clean + jnp.sqrt((after - levels[-1]) * (after + levels[-1])) * noise(index + 1)

    return scan_steps(step, x, levels)
