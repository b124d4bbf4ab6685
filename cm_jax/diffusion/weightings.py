"""Weightings w(t, r) of the losses for a pair of noise levels t > r. A denoiser's loss has r = 0."""

import abc
import dataclasses

import jax.numpy as jnp

from cm_jax.types import Sigmas


class Weighting(abc.ABC):
    """w(t, r), one weight per image, for data of standard deviation sigma_data."""

    @abc.abstractmethod
    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas: ...


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """1, as all published consistency models use."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class SNR(Weighting):
    """snr = 1 / t^2."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return t**-2


@dataclasses.dataclass(frozen=True)
class SNRPlusOne(Weighting):
    """snr + 1."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return t**-2 + 1


@dataclasses.dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(snr, 1) (progressive distillation)."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return jnp.maximum(t**-2, 1)


@dataclasses.dataclass(frozen=True)
class Karras(Weighting):
    """snr + 1 / sigma_data^2 = 1 / c_out(t)^2 of EDMPreconditioning (EDM, table 1; ECT for ImageNet-64).

    Errors of the network's raw output count equally at all noise levels.
    """

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return t**-2 + sigma_data**-2


@dataclasses.dataclass(frozen=True)
class InverseGap(Weighting):
    """1 / (t - r) (iCT, section 3.1; ECT for CIFAR-10)."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return 1 / (t - r)


AnyWeighting = Uniform | SNR | SNRPlusOne | TruncatedSNR | Karras | InverseGap
