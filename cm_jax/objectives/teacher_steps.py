"""Single steps of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, every image at its own levels."""

from collections.abc import Callable

from cm_jax.arrays import Denoiser, Images, Sigmas, per_image

Solver = Callable[[Denoiser, Images, Sigmas, Sigmas], Images]
"""(teacher, x_t, t, r) -> x_r."""


def slope(teacher: Denoiser, x: Images, t: Sigmas) -> Images:
    """(x - D(x, t)) / t      (EDM, eq. 3)."""
    return (x - teacher(x, t)) / per_image(t)


def euler_step(teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images:
    """First order, one call of the teacher: x + (r - t) dx/dt."""
    return x + per_image(r - t) * slope(teacher, x, t)


def heun_step(teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images:
    """Second order, two calls: the mean of the slopes at both ends (CM, appendix C)."""
    first = slope(teacher, x, t)
    second = slope(teacher, x + per_image(r - t) * first, r)
    return x + per_image(r - t) * (first + second) / 2
