"""Noise levels sigma, and the three ways to name one: index on a grid, sigma itself, model time.

Every published consistency model was trained on a grid of N levels that falls from sigma_max to sigma_min
(EDM, eq. 5; CM, section 6). Index 0 is the noisiest level, index N - 1 the cleanest, as in the published checkpoints.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.errors import InputError

ADM_TIME = 250.0
"""c_noise = 250 ln sigma: OpenAI's networks (1000 times EDM's convention)."""
EDM_TIME = 0.25
"""c_noise = ln sigma / 4: EDM's networks and the CIFAR-10 ones (EDM, table 1)."""


def karras_sigma(
    index: Any, levels: Any, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Any:
    """sigma(i) = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho, for i = 0 ... N - 1 (EDM, eq. 5).

    Plain numbers and NumPy arrays are computed in double precision; JAX arrays, traced ones too, in their own. `levels`
    (N, at least 2) may be traced, so a growing curriculum N(k) does not recompile. `index` need not be whole.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + index / (levels - 1) * (low - high)) ** rho


def karras_index(
    sigma: Any, levels: Any, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Any:
    """The inverse of `karras_sigma`: a real number, whole only on the grid."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (levels - 1) * (sigma ** (1 / rho) - high) / (low - high)


@dataclasses.dataclass(frozen=True)
class KarrasCurve:
    """The curve on which grids of any number of levels lie (EDM, eq. 5): for curricula, whose N(k) grows in training.

    Raises InputError unless 0 < sigma_min < sigma_max and rho > 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and self.rho > 0):
            raise InputError(
                f"Noise levels need 0 < sigma_min < sigma_max and rho > 0; got sigma_min={self.sigma_min}, "
                f"sigma_max={self.sigma_max}, rho={self.rho}."
            )

    def sigma(self, index: Any, levels: Any) -> Any:
        """Index to level on a grid of `levels`; both may be traced. Index 0 is sigma_max, levels - 1 is sigma_min."""
        return karras_sigma(index, levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def index(self, sigma: Any, levels: Any) -> Any:
        """Level to index, the inverse of `sigma`."""
        return karras_index(sigma, levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)


@dataclasses.dataclass(frozen=True)
class KarrasGrid:
    """The levels that a model was trained on (EDM, eq. 5).

    Raises InputError unless levels >= 2, 0 < sigma_min < sigma_max <= 1e6 and 0.1 <= rho <= 100.
    """

    levels: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        fine = 0 < self.sigma_min < self.sigma_max <= 1e6 and 0.1 <= self.rho <= 100
        if not (fine and 2 <= self.levels <= 2**20 and self.levels == int(self.levels)):
            raise InputError(
                f"A noise grid needs whole levels >= 2, 0 < sigma_min < sigma_max <= 1e6 and rho from 0.1 to 100; "
                f"got levels={self.levels}, sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, rho={self.rho}."
            )

    def sigma(self, index: Any) -> Any:
        """Index to level; index 0 is sigma_max, levels - 1 is sigma_min."""
        return karras_sigma(index, self.levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def index(self, sigma: Any) -> Any:
        """Level to index, the inverse of `sigma`: a real number, whole only on the grid."""
        return karras_index(sigma, self.levels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def descending(self, count: int) -> np.ndarray:
        """`count` levels from sigma_max to sigma_min on the same curve; a single one is sigma_max. float32 [count].

        In single precision, as the original computes the levels of its ODE solvers: the last bit of a level is visible,
        because c_noise = 250 ln sigma magnifies it.
        """
        high, low = (np.float32(edge ** (1 / self.rho)) for edge in (self.sigma_max, self.sigma_min))
        return (high + np.linspace(0, 1, count, dtype=np.float32) * (low - high)) ** np.float32(self.rho)


def model_time(sigma: Float[Array, "..."], factor: float = ADM_TIME) -> Float[Array, "..."]:
    """c_noise(sigma) = factor ln sigma, the number that a network is told in place of its noise level.

    The logarithm is held finite at sigma = 0.
    """
    return factor * jnp.log(jnp.maximum(sigma, jnp.finfo(jnp.float32).tiny))


def sigma_at_time(time: Float[Array, "..."], factor: float = ADM_TIME) -> Float[Array, "..."]:
    """The inverse of `model_time`."""
    return jnp.exp(time / factor)


def trigflow_time(sigma: Float[Array, "..."], sigma_data: float = 0.5) -> Float[Array, "..."]:
    """t = arctan(sigma / sigma_data), in [0, pi/2): the angle at which TrigFlow mixes data and noise (sCM)."""
    return jnp.arctan(sigma / sigma_data)


def sigma_at_trigflow_time(time: Float[Array, "..."], sigma_data: float = 0.5) -> Float[Array, "..."]:
    """The inverse of `trigflow_time`: sigma = sigma_data tan t."""
    return sigma_data * jnp.tan(time)


def flow_time(sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """t = sigma / (1 + sigma), in [0, 1): the share of noise on the straight path from data to noise (MeanFlow)."""
    return sigma / (1 + sigma)
