"""The probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, and solver steps.

Steps lead from t to r, for one scalar t and r or for one value of each per image.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cm_jax.types import Denoiser, Images, Sigmas, per_image

State = TypeVar("State")
"""Images, or a tree of arrays."""
Level = Float[Array, ""] | Sigmas
"""One value for the whole batch, or one per image."""
Derivative = Callable[[State, Any], State]
"""(x, t) -> dx/dt."""


def dx_dlog_sigma(denoiser: Denoiser, x: Images, sigma: Level) -> Images:
    """dx / d ln sigma = x - D(x, sigma)."""
    return x - denoiser(x, jnp.broadcast_to(sigma, x.shape[:1]))


def dx_dsigma(denoiser: Denoiser, x: Images, sigma: Level) -> Images:
    """(x - D(x, sigma)) / sigma      (EDM, eqs. 1 and 3)."""
    return dx_dlog_sigma(denoiser, x, sigma) / _over_pixels(sigma)


def euler_step(derivative: Derivative[State], x: State, t: Level, r: Level) -> State:
    """First order: x + (r - t) dx/dt."""
    first = derivative(x, t)
    return jax.tree.map(lambda x, first: x + _over_pixels(r - t) * first, x, first)


def heun_step(
    derivative: Derivative[State], x: State, t: Level, r: Level, *, correct: Bool[Array, ""] | None = None
) -> State:
    """Second order: an Euler step, then one with the mean of dx/dt at both ends (EDM, algorithm 1).

    Without `correct` (which may be traced) the first of them is returned, and dx/dt at r is not computed.
    """
    h, first = _over_pixels(r - t), derivative(x, t)
    euler = jax.tree.map(lambda x, first: x + h * first, x, first)

    def corrected() -> State:
        return jax.tree.map(lambda x, first, second: x + h * (first + second) / 2, x, first, derivative(euler, r))

    return corrected() if correct is None else jax.lax.cond(correct, corrected, lambda: euler)


class ODEStep(abc.ABC):
    """(teacher, x_t, t, r) -> x_r, one step of a solver for the teacher's probability-flow ODE."""

    @abc.abstractmethod
    def __call__(self, teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images: ...


@dataclasses.dataclass(frozen=True)
class EulerStep(ODEStep):
    """First order, one call of the teacher."""

    def __call__(self, teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images:
        return euler_step(functools.partial(dx_dsigma, teacher), x, t, r)


@dataclasses.dataclass(frozen=True)
class HeunStep(ODEStep):
    """Second order, two calls of the teacher (CM, appendix C)."""

    def __call__(self, teacher: Denoiser, x: Images, t: Sigmas, r: Sigmas) -> Images:
        return heun_step(functools.partial(dx_dsigma, teacher), x, t, r)


AnyODEStep = EulerStep | HeunStep | ODEStep


def _over_pixels(level: Level) -> Array:
    """A scalar as it is; one value per image as [b, 1, 1, 1]."""
    return per_image(level) if jnp.ndim(level) else level
