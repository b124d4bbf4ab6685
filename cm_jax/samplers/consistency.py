"""The samplers of a consistency function: one call, or several with fresh noise between."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.samplers.base import Levels, Sampler, intervals
from cm_jax.types import Denoiser, Images, NoiseSource, Sigmas


@dataclasses.dataclass(frozen=True)
class Consistency(Sampler):
    """x_0 = f(x, s_i), then x = x_0 + sqrt(s_{i+1}^2 - sigma_min^2) z: CM, algorithm 1. One step is f(s_0 z, s_0)."""

    ends_at_boundary: ClassVar[bool] = True

    def levels(self, steps: int, grid: KarrasGrid) -> tuple[float, ...]:
        """Levels at grid indices 0, q, 2q, ... with q = N // steps, as diffusers spaces them.

        More steps than the grid has levels get EDM's spacing.
        """
        if steps > grid.levels:
            return super().levels(steps, grid)
        indices = [step * (grid.levels // steps) for step in range(steps)]
        return (*(float(grid.sigma(index)) for index in indices), self.closing(grid))

    def draws(self, steps: int) -> int:
        return 1 if steps == 1 else steps + 1

    def __call__(self, denoiser: Denoiser, levels: Levels, draw: NoiseSource) -> Images:
        if levels.shape[0] == 2:
            return jnp.clip(self.denoise(denoiser, levels[0] * draw(0), levels[0]), -1, 1)

        def clean(x: Images, sigma: Sigmas) -> Images:
            return self.denoise(denoiser, x, sigma[0])

        return jnp.clip(multistep_sample(clean, levels[0] * draw(0), levels, draw), -1, 1)


def multistep_sample(denoiser: Denoiser, x: Images, levels: Levels, draw: NoiseSource) -> Images:
    """From x at the first level: denoise, add fresh noise of the next level, and so on; nothing is clipped.

    No noise is added at the last level, sigma_min, so that the end is the last denoised image itself.
    """

    def step(x, interval):
        index, now, after = interval
        clean = denoiser(x, jnp.full(x.shape[0], now))
        return clean + jnp.sqrt((after - levels[-1]) * (after + levels[-1])) * draw(index + 1), None

    x, _ = jax.lax.scan(step, x, intervals(levels))
    return x
