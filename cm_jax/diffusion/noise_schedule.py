"""Noise schedules: conversions among level indices, noise standard deviations sigma, and model times."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.errors import InputError

NUM_LEVELS = 40
"""Default N (CM, appendix C)."""
ADM_TIME = 250.0
"""c_noise = 250 ln sigma: OpenAI's networks (1000 times EDM's convention)."""
EDM_TIME = 0.25
"""c_noise = ln sigma / 4: EDM's networks and the CIFAR-10 ones (EDM, table 1)."""


@dataclasses.dataclass(frozen=True)
class KarrasSchedule:
    """Noise levels from sigma_max down to sigma_min, for any number of levels N (EDM, eq. 5).

    Index 0 is sigma_max and index N - 1 is sigma_min. N may be traced, so a growing curriculum N(k) compiles once.
    Raises InputError unless 0 < sigma_min < sigma_max <= 1e6 and 0.1 <= rho <= 100.
    """

    sigma_min: float = 0.002
    """Lowest noise level."""
    sigma_max: float = 80.0
    """Highest noise level."""
    rho: float = 7.0
    """Exponent; larger values place more levels near sigma_min."""

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max <= 1e6 and 0.1 <= self.rho <= 100):
            raise InputError(
                "A noise schedule needs 0 < sigma_min < sigma_max <= 1e6 and rho from 0.1 to 100; got "
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, rho={self.rho}."
            )

    def sigma(self, index: Any, num_levels: Any) -> Any:
        """sigma(i) = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho; i need not be an integer.

        Python numbers and NumPy arrays are computed in double precision, JAX arrays in their own precision.
        """
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + index / (num_levels - 1) * (low - high)) ** self.rho

    def index(self, sigma: Any, num_levels: Any) -> Any:
        """The inverse of `sigma`: a real number, an integer only at the N levels themselves."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (num_levels - 1) * (sigma ** (1 / self.rho) - high) / (low - high)

    def descending(self, num_levels: int) -> np.ndarray:
        """All N levels from sigma_max to sigma_min, float32 [N]; a single level is sigma_max.

        Computed in single precision, as OpenAI's ODE solvers do: c_noise = 250 ln sigma magnifies rounding errors.
        """
        high, low = (np.float32(edge ** (1 / self.rho)) for edge in (self.sigma_max, self.sigma_min))
        return (high + np.linspace(0, 1, num_levels, dtype=np.float32) * (low - high)) ** np.float32(self.rho)


def model_time(sigma: Float[Array, "..."], factor: float = ADM_TIME) -> Float[Array, "..."]:
    """c_noise(sigma) = factor ln sigma, the noise conditioning of a network; finite at sigma = 0."""
    return factor * jnp.log(jnp.maximum(sigma, jnp.finfo(jnp.float32).tiny))


def sigma_at_time(time: Float[Array, "..."], factor: float = ADM_TIME) -> Float[Array, "..."]:
    """The inverse of `model_time`."""
    return jnp.exp(time / factor)


def trigflow_time(sigma: Float[Array, "..."], sigma_data: float = 0.5) -> Float[Array, "..."]:
    """TrigFlow's time t = arctan(sigma / sigma_data), in [0, pi/2) (sCM)."""
    return jnp.arctan(sigma / sigma_data)


def sigma_at_trigflow_time(time: Float[Array, "..."], sigma_data: float = 0.5) -> Float[Array, "..."]:
    """The inverse of `trigflow_time`: sigma = sigma_data tan t."""
    return sigma_data * jnp.tan(time)


def flow_time(sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """t = sigma / (1 + sigma), in [0, 1): the time on the straight path from data (0) to noise (1) (MeanFlow)."""
    return sigma / (1 + sigma)
