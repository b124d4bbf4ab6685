"""Preconditioning: coefficients that turn a network F into a denoiser or a consistency function.

f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))      (EDM, eq. 7; CM, eq. 5)
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.diffusion.noise_schedule import ADM_TIME, flow_time, model_time, trigflow_time
from cm_jax.errors import InputError
from cm_jax.types import Images, Sigmas, per_image

AnyLevels = Float[Array | np.ndarray, "*n"]
"""Noise levels of any shape, also on the host."""


class Preconditioning(abc.ABC):
    """The coefficients c_in, c_skip, c_out and the noise conditioning c_noise as functions of sigma.

    The noise schedule's sigma_min enters c_skip and c_out only where f(x, sigma_min) = x is required.
    """

    sigma_data: float
    """Standard deviation of the clean data."""

    @abc.abstractmethod
    def c_in(self, sigma: Sigmas) -> Sigmas: ...

    @abc.abstractmethod
    def c_skip(self, sigma: Sigmas, sigma_min: float) -> Sigmas: ...

    @abc.abstractmethod
    def c_out(self, sigma: Sigmas, sigma_min: float) -> Sigmas: ...

    @abc.abstractmethod
    def c_noise(self, sigma: Sigmas) -> Sigmas: ...

    def c_interval(self, sigma: Sigmas, until: Sigmas) -> Sigmas:
        """The conditioning on the interval from sigma to `until`: the time of its lower end (multi-segment sCD)."""
        return self.c_noise(until)

    def round_sigma(self, sigma: AnyLevels) -> AnyLevels:
        """The nearest noise level at which the network is defined: sigma itself, unless levels are discrete."""
        return sigma

    def boundary(self, sigma_min: float) -> float:
        """The noise level at which f(x, sigma) = x for any network."""
        return 0.0

    def blend(self, x: Images, sigma: Sigmas, raw: Images, sigma_min: float) -> Images:
        """c_skip(sigma) x + c_out(sigma) raw, for the network's output `raw`."""
        return per_image(self.c_skip(sigma, sigma_min)) * x + per_image(self.c_out(sigma, sigma_min)) * raw


@dataclasses.dataclass(frozen=True)
class LogSigmaPreconditioning(Preconditioning):
    """Common base: input c_in x of unit variance, and c_noise = time_factor ln sigma."""

    sigma_data: float = 0.5
    """Standard deviation of the clean data."""
    time_factor: float = ADM_TIME
    """c_noise / ln sigma: 250 for the networks of CM, 0.25 for those of EDM."""

    def __post_init__(self) -> None:
        if not (0 < self.sigma_data < math.inf and 0 < self.time_factor < math.inf):
            raise InputError(
                f"Expected positive, finite sigma_data and time_factor, got {self.sigma_data} and {self.time_factor}."
            )

    def c_in(self, sigma: Sigmas) -> Sigmas:
        return 1 / jnp.sqrt(sigma**2 + self.sigma_data**2)

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        return model_time(sigma, self.time_factor)


@dataclasses.dataclass(frozen=True)
class EDMPreconditioning(LogSigmaPreconditioning):
    """Preconditioning of a denoiser: network outputs have unit variance at every noise level (EDM, table 1)."""

    def c_skip(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return sigma * self.sigma_data / jnp.sqrt(sigma**2 + self.sigma_data**2)


@dataclasses.dataclass(frozen=True)
class TrigFlowPreconditioning(EDMPreconditioning):
    """EDM's coefficients with c_noise = time_factor arctan(sigma / sigma_data) (sCM).

    At x = x_t / cos t this is TrigFlow's f = cos t x_t - sin t sigma_data F, where F is minus the network's output.
    """

    time_factor: float = 1.0
    """c_noise / arctan(sigma / sigma_data)."""

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        return self.time_factor * trigflow_time(sigma, self.sigma_data)


@dataclasses.dataclass(frozen=True)
class ConsistencyPreconditioning(LogSigmaPreconditioning):
    """c_skip(sigma_min) = 1 and c_out(sigma_min) = 0, so that f(x, sigma_min) = x (CM, appendix C)."""

    def c_skip(self, sigma: Sigmas, sigma_min: float) -> Sigmas:
        return self.sigma_data**2 / ((sigma - sigma_min) ** 2 + self.sigma_data**2)

    def c_out(self, sigma: Sigmas, sigma_min: float) -> Sigmas:
        """The root takes sigma itself."""
        return (sigma - sigma_min) * self.sigma_data / jnp.sqrt(sigma**2 + self.sigma_data**2)

    def boundary(self, sigma_min: float) -> float:
        return sigma_min


@dataclasses.dataclass(frozen=True)
class MeanFlowPreconditioning(Preconditioning):
    """f(x, sigma) = z - t u(z, t, t) with z = x / (1 + sigma) and t = sigma / (1 + sigma) (MeanFlow).

    This makes a consistency function, f(x, 0) = x, of MeanFlow's network u. Its second argument is t and its third the
    interval's length t - r, which is t for r = 0. Both enter the network as multiples of time_factor: 1 suits networks
    made for c_noise = ln sigma / 4; the sinusoids of ADM's networks also cover values up to a thousand.
    """

    time_factor: float = 1.0
    """Factor of t and t - r in the input of the network."""

    sigma_data: ClassVar[float] = 0.5  # type: ignore[override]  # a constant in place of the field
    """For weightings and likelihoods; MeanFlow's own coefficients do not use it."""

    def __post_init__(self) -> None:
        if not 0 < self.time_factor < math.inf:
            raise InputError(f"Expected a positive, finite time_factor, got {self.time_factor}.")

    def c_in(self, sigma: Sigmas) -> Sigmas:
        return 1 / (1 + sigma)

    def c_skip(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return 1 / (1 + sigma)

    def c_out(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return -flow_time(sigma)

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        return self.time_factor * flow_time(sigma)

    def c_interval(self, sigma: Sigmas, until: Sigmas) -> Sigmas:
        """The interval's length t - r."""
        return self.c_noise(sigma) - self.c_noise(until)


class _UnitSkipPreconditioning(Preconditioning):
    """D(x) = x + c_out F(c_in x): the preconditionings before EDM (EDM, table 1)."""

    sigma_data: ClassVar[float] = 0.5  # type: ignore[override]  # a constant in place of the field
    """For weightings and likelihoods; the coefficients do not use it."""

    def c_in(self, sigma: Sigmas) -> Sigmas:
        return 1 / jnp.sqrt(sigma**2 + 1)

    def c_skip(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return jnp.ones_like(sigma)

    def c_out(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return -sigma


@dataclasses.dataclass(frozen=True)
class VPPreconditioning(_UnitSkipPreconditioning):
    """The variance-preserving diffusion of Song et al. 2021, with time t scaled by 999."""

    beta_d: float = 19.9
    """Slope of beta(t) = beta_min + beta_d t."""
    beta_min: float = 0.1
    """beta(0)."""

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        """999 t(sigma), t = (sqrt(beta_min^2 + 2 beta_d ln(1 + sigma^2)) - beta_min) / beta_d."""
        root = jnp.sqrt(self.beta_min**2 + 2 * self.beta_d * jnp.log(1 + sigma**2))
        return 999 * (root - self.beta_min) / self.beta_d


@dataclasses.dataclass(frozen=True)
class VEPreconditioning(_UnitSkipPreconditioning):
    """The variance-exploding diffusion of Song et al. 2021."""

    def c_in(self, sigma: Sigmas) -> Sigmas:
        return jnp.ones_like(sigma)

    def c_out(self, sigma: Sigmas, sigma_min: float = 0.0) -> Sigmas:
        return sigma

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        """ln(sigma / 2), finite at sigma = 0."""
        return model_time(sigma / 2, 1.0)


@dataclasses.dataclass(frozen=True)
class IDDPMPreconditioning(_UnitSkipPreconditioning):
    """The 1000 discrete noise levels u_j of improved DDPM (Nichol and Dhariwal 2021; EDM, table 1)."""

    def levels(self) -> np.ndarray:
        """u_0 > u_1 > ... > u_1000 = 0, in float32, in which EDM's networks compute and store them."""
        steps, c_1, c_2 = 1000, np.float32(0.001), np.float32(1.008)
        cosine = np.sin(np.float32(0.5 * np.pi) * np.arange(steps + 1, dtype=np.float32) / np.float32(steps) / c_2) ** 2
        levels = np.zeros(steps + 1, np.float32)
        for j in range(steps, 0, -1):
            levels[j - 1] = np.sqrt((levels[j] ** 2 + 1) / np.maximum(cosine[j - 1] / cosine[j], c_1) - 1)
        return levels

    def c_noise(self, sigma: Sigmas) -> Sigmas:
        """999 minus the index of the nearest level."""
        return 999.0 - self._nearest(sigma).astype(jnp.float32)

    def round_sigma(self, sigma: AnyLevels) -> AnyLevels:
        return jnp.asarray(self.levels(), jnp.float32)[self._nearest(sigma)]

    def _nearest(self, sigma: AnyLevels) -> Array:
        return jnp.argmin(jnp.abs(sigma[..., None] - jnp.asarray(self.levels(), jnp.float32)), axis=-1)


AnyPreconditioning = (
    EDMPreconditioning
    | TrigFlowPreconditioning
    | ConsistencyPreconditioning
    | MeanFlowPreconditioning
    | VPPreconditioning
    | VEPreconditioning
    | IDDPMPreconditioning
    | Preconditioning
)
"""`Preconditioning` admits those of other packages; files hold registered ones."""
