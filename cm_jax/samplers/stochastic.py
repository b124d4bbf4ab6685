"""Samplers that replace part of the noise in every step."""

import dataclasses

import jax.numpy as jnp

from cm_jax.diffusion.ode import euler_step
from cm_jax.samplers.base import ODESampler


@dataclasses.dataclass(frozen=True)
class Ancestral(ODESampler):
    """An Euler step to s_down = s_{i+1}^2 / s_i, then noise: s_up^2 = s_{i+1}^2 (s_i^2 - s_{i+1}^2) / s_i^2."""

    def num_noise_samples(self, steps: int) -> int:
        return steps + 1

    def step(self, derivative, x, now, after, steps, noise):
        up = after * jnp.sqrt((now - after) * (now + after)) / now
        return euler_step(derivative, x, now, after**2 / now) + up * noise()
