"""Samplers that replace part of the noise at every step."""

import dataclasses

import jax
import jax.numpy as jnp

from cm_jax.samplers.base import Levels, Sampler, intervals
from cm_jax.types import Denoiser, Images, NoiseSource


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """Euler's step to s_down, then fresh noise up to s_{i+1}: s_up^2 = s_{i+1}^2 (s_i^2 - s_{i+1}^2) / s_i^2."""

    def draws(self, steps: int) -> int:
        return steps + 1

    def __call__(self, denoiser: Denoiser, levels: Levels, draw: NoiseSource) -> Images:
        slope = self.slope(denoiser)

        def step(x, interval):
            index, now, after = interval
            up = after * jnp.sqrt((now - after) * (now + after)) / now
            down = after**2 / now
            x = x + (down - now) * slope(x, now)
            return x + up * draw(index + 1), None

        x, _ = jax.lax.scan(step, levels[0] * draw(0), intervals(levels))
        return jnp.clip(x, -1, 1)
