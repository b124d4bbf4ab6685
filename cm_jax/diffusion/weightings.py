"""Weights of the losses. A weighting is called with both levels of a pair, t noisier than r; a denoiser's r is 0."""

import abc
import dataclasses

import jax.numpy as jnp

from cm_jax.types import Sigmas


class Weighting(abc.ABC):
    """w(t, r), one weight per image."""

    @abc.abstractmethod
    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas: ...


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """1, as all published consistency models use."""

    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas:
        del r
        return jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class SNR(Weighting):
    """snr = 1 / t^2."""

    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas:
        del r
        return t**-2


@dataclasses.dataclass(frozen=True)
class SNRPlusOne(Weighting):
    """snr + 1."""

    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas:
        del r
        return t**-2 + 1


@dataclasses.dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(snr, 1) (progressive distillation)."""

    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas:
        del r
        return jnp.maximum(t**-2, 1)


@dataclasses.dataclass(frozen=True)
class Karras(Weighting):
    """snr + 1 / sigma_data^2 = 1 / c_out(t)^2 of a denoiser: the raw network's error counts alike (EDM, table 1).

    ECT uses it for ImageNet-64.
    """

    sigma_data: float = 0.5

    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas:
        del r
        return t**-2 + self.sigma_data**-2


@dataclasses.dataclass(frozen=True)
class InverseGap(Weighting):
    """1 / (t - r) (iCT, section 3.1; ECT for CIFAR-10)."""

    def __call__(self, t: Sigmas, r: Sigmas) -> Sigmas:
        return 1 / (t - r)
