"""What samplers have in common."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.types import Denoiser, Images, NoiseSource

Levels = Float[Array, " n"]
"""Falling noise levels, the closing one included: n - 1 steps."""
Level = Float[Array, ""]
"""One level for the whole batch."""


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """sampler(denoiser, levels, draw) -> images in [-1, 1].

    `draw(0)` times the first level is the start; `draw(i + 1)` belongs to step i, in the order in which the original
    draws. `clip` holds every denoised image in [-1, 1] on the way, as the original does by default.
    """

    clip: bool = True

    ends_at_boundary: ClassVar[bool] = False
    """Whether it ends at sigma_min, where consistency functions are the identity: tuned timesteps are for these."""

    def levels(self, steps: int, grid: KarrasGrid) -> tuple[float, ...]:
        """Its own choice of levels for `steps` steps, the closing one included: by default EDM's spacing."""
        return (*map(float, grid.descending(steps)), self.closing(grid))

    def closing(self, grid: KarrasGrid) -> float:
        """The level at which it ends, after the last call of the denoiser."""
        return grid.sigma_min if self.ends_at_boundary else 0.0

    def draws(self, steps: int) -> int:
        """How many draws of noise it uses in so many steps, the start included."""
        del steps
        return 1

    @abc.abstractmethod
    def __call__(self, denoiser: Denoiser, levels: Levels, draw: NoiseSource) -> Images: ...

    def denoise(self, denoiser: Denoiser, x: Images, level: Level) -> Images:
        """D(x, level), clipped where that is on."""
        estimate = denoiser(x, jnp.full(x.shape[0], level))
        return jnp.clip(estimate, -1, 1) if self.clip else estimate

    def slope(self, denoiser: Denoiser) -> Callable[[Images, Level], Images]:
        """dx/dsigma = (x - D(x, sigma)) / sigma, the probability-flow ODE      (EDM, eq. 3)."""
        return lambda x, level: (x - self.denoise(denoiser, x, level)) / level


def intervals(levels: Levels) -> tuple[Int[Array, " steps"], Float[Array, " steps"], Float[Array, " steps"]]:
    """(step, level now, level after) of every step, to scan over."""
    return jnp.arange(levels.shape[0] - 1), levels[:-1], levels[1:]
