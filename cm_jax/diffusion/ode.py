"""Single steps of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, every image at its own levels."""

import abc
import dataclasses

from cm_jax.types import Denoiser, Images, Sigmas, per_image


class ODEStep(abc.ABC):
    """(teacher, x_t, t, r) -> x_r."""

    @abc.abstractmethod
    def __call__(self, teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images: ...


def slope(teacher: Denoiser, x: Images, t: Sigmas) -> Images:
    """(x - D(x, t)) / t      (EDM, eqs. 1 and 3)."""
    return (x - teacher(x, t)) / per_image(t)


@dataclasses.dataclass(frozen=True)
class EulerStep(ODEStep):
    """First order, one call of the teacher: x + (r - t) dx/dt."""

    def __call__(self, teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images:
        return x + per_image(r - t) * slope(teacher, x, t)


@dataclasses.dataclass(frozen=True)
class HeunStep(ODEStep):
    """Second order, two calls: the mean of the slopes at both ends (CM, appendix C)."""

    def __call__(self, teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images:
        first = slope(teacher, x, t)
        second = slope(teacher, x + per_image(r - t) * first, r)
        return x + per_image(r - t) * (first + second) / 2
