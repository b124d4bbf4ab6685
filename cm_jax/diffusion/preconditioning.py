"""Scalings that turn a raw network F into a denoiser or a consistency function.

D(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))      (EDM, eq. 7; CM, eq. 5)
"""

import abc
import dataclasses
import math

import jax.numpy as jnp

from cm_jax.diffusion.noise_schedule import ADM_TIME, flow_time, model_time, trigflow_time
from cm_jax.errors import InputError
from cm_jax.types import Images, Sigmas, per_image


class Preconditioning(abc.ABC):
    """c_in, c_skip, c_out and the network's clock c_noise, each a function of sigma."""

    @abc.abstractmethod
    def c_in(self, sigma: Sigmas) -> Sigmas: ...

    @abc.abstractmethod
    def c_skip(self, sigma: Sigmas) -> Sigmas: ...

    @abc.abstractmethod
    def c_out(self, sigma: Sigmas) -> Sigmas: ...

    @abc.abstractmethod
    def c_noise(self, sigma: Sigmas) -> Sigmas: ...

    def blend(self, x: Images, sigma: Sigmas, raw: Images) -> Images:
        """c_skip(sigma) x + c_out(sigma) raw, for the network's output `raw`."""
        return per_image(self.c_skip(sigma)) * x + per_image(self.c_out(sigma)) * raw


@dataclasses.dataclass(frozen=True)
class LogSigmaPreconditioning(Preconditioning):
    """What most scalings share: unit-variance input c_in x, and the clock c_noise = time_factor ln sigma."""

    sigma_data: float = 0.5
    """Standard deviation of the clean data."""
    time_factor: float = ADM_TIME

    def __post_init__(self) -> None:
        if not (0 < self.sigma_data < math.inf and 0 < self.time_factor < math.inf):
            raise InputError(
                f"Scalings need positive, finite sigma_data and time_factor; got {self.sigma_data}, {self.time_factor}."
            )

    def c_in(self, sigma: Sigmas) -> Sigmas:
        """1 / sqrt(sigma^2 + sigma_data^2)."""
        return 1 / jnp.sqrt(sigma**2 + self.sigma_data**2)

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        return model_time(sigma, self.time_factor)


@dataclasses.dataclass(frozen=True)
class EDMPreconditioning(LogSigmaPreconditioning):
    """Scalings of a denoiser (EDM, table 1): unit-variance targets at every level."""

    def c_skip(self, sigma: Sigmas) -> Sigmas:
        """sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Sigmas) -> Sigmas:
        """sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return sigma * self.sigma_data / jnp.sqrt(sigma**2 + self.sigma_data**2)


@dataclasses.dataclass(frozen=True)
class TrigFlowPreconditioning(EDMPreconditioning):
    """EDM's scalings with TrigFlow's clock, c_noise = time_factor arctan(sigma / sigma_data) (sCM).

    At x = x_t / cos t they give TrigFlow's f = cos t x_t - sin t sigma_data F, where F is minus the raw output.
    """

    time_factor: float = 1.0

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        return self.time_factor * trigflow_time(sigma, self.sigma_data)


@dataclasses.dataclass(frozen=True)
class ConsistencyPreconditioning(LogSigmaPreconditioning):
    """Scalings with c_skip(sigma_min) = 1 and c_out(sigma_min) = 0, so that f(x, sigma_min) = x (CM, appendix C)."""

    sigma_min: float = 0.002

    def c_skip(self, sigma: Sigmas) -> Sigmas:
        """sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)."""
        return self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)

    def c_out(self, sigma: Sigmas) -> Sigmas:
        """(sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2); the root holds sigma itself."""
        return (sigma - self.sigma_min) * self.sigma_data / jnp.sqrt(sigma**2 + self.sigma_data**2)


@dataclasses.dataclass(frozen=True)
class MeanFlowPreconditioning(Preconditioning):
    """f(x, sigma) = z - t u(z, t, t), where z = x / (1 + sigma) = (1 - t) x_0 + t e and t = sigma / (1 + sigma).

    They make an ordinary consistency function, f(x, 0) = x, of MeanFlow's network u, which is told t and the length of
    the interval: all of t here (MeanFlow). Both are told as multiples of time_factor: 1 lies where EDM's clock
    ln sigma / 4 does, and suits the networks that know it; ADM's sinusoids know numbers up to a thousand, too.
    """

    time_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.time_factor < math.inf:
            raise InputError(f"Scalings need a positive, finite time_factor; got {self.time_factor}.")

    def c_in(self, sigma: Sigmas) -> Sigmas:
        """1 / (1 + sigma)."""
        return 1 / (1 + sigma)

    def c_skip(self, sigma: Sigmas) -> Sigmas:
        """1 / (1 + sigma)."""
        return 1 / (1 + sigma)

    def c_out(self, sigma: Sigmas) -> Sigmas:
        """-t."""
        return -flow_time(sigma)

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        return self.time_factor * flow_time(sigma)
