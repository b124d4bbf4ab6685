"""Continuous-time consistency models in TrigFlow: training (sCT) and distillation (sCD) (sCM).

x_t = cos t x_0 + sin t sigma_data z, with t in [0, pi/2) and sigma = sigma_data tan t. The network is one with EDM's
scalings or TrigFlow's: at x_t / sigma_data it sees exactly what it sees at x_t / cos t and level sigma, and its raw
output is minus TrigFlow's F. So the weights of an EDM denoiser continue as they are, and samplers need not know.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Rate, Step, WarmUp
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.noise_schedule import sigma_at_trigflow_time, trigflow_time
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives.base import (
    Batch,
    FrozenParams,
    Losses,
    Metrics,
    Models,
    Objective,
    demand_forward_derivatives,
    split_keys,
)
from cm_jax.types import Images, Keys, Labels, Params, Sigmas, normal_per_image, per_image

Times = Float[Array, " b"]
Field = Callable[[Images, Times], Images]
"""F: (x_t / sigma_data, t) -> the network's estimate of v_t / sigma_data."""


@dataclasses.dataclass(frozen=True)
class _ContinuousTime(Objective):
    """What both share: 1 / d ||F - F^- - g||^2, F^- = stop(F), g the normalised tangent; sCM has `adaptive` too."""

    noise_distribution: LogNormal = LogNormal(-1.0, 1.4)
    """Of sigma = sigma_data tan t."""
    warm_up: WarmUp = WarmUp()
    regulariser: float = 0.1
    """c in g / (|g| + c); |g| is the root of the mean square, so that it does not depend on the image's size."""

    def __post_init__(self) -> None:
        if not self.regulariser > 0:
            raise InputError(f"The regulariser of the tangent's norm must be positive, got {self.regulariser}.")

    def check(self, models: Models) -> None:
        super().check(models)
        trigflow_scaling(models.student)
        demand_forward_derivatives(self, models.student)

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        key_level, key_noise, key_dropout = split_keys(keys)
        sigma = self.noise_distribution(key_level)
        sigma_data = trigflow_scaling(models.student).sigma_data
        t = trigflow_time(sigma, sigma_data)
        noise = sigma_data * normal_per_image(key_noise, batch.images.shape[1:])
        x_t = per_image(jnp.cos(t)) * batch.images + per_image(jnp.sin(t)) * noise
        velocity = self.velocity(models, frozen, batch, x_t, t, noise)
        field = trigflow_field(models.student, params, batch.labels, key_dropout)
        losses, tangent_norm = self.losses(field, x_t, t, velocity, self.warm_up(step), sigma_data)
        return losses, {"sigma": sigma, "tangent_norm": tangent_norm}

    @abc.abstractmethod
    def velocity(
        self, models: Models, frozen: FrozenParams, batch: Batch, x_t: Images, t: Times, noise: Images
    ) -> Images:
        """dx_t / dt."""

    def losses(
        self,
        field: Field,
        x_t: Images,
        t: Times,
        velocity: Images,
        warm_up: Rate | float,
        sigma_data: float = 0.5,
    ) -> tuple[Losses, Losses]:
        """Losses, and the root mean square of the tangent before it is normalised."""
        prediction, tangent = self.tangent(field, x_t, t, velocity, warm_up, sigma_data)
        norm = jnp.sqrt(jnp.square(tangent).mean((1, 2, 3)))
        goal = jax.lax.stop_gradient(prediction + tangent / per_image(norm + self.regulariser))
        return jnp.square(prediction - goal).mean((1, 2, 3)), norm

    def tangent(
        self,
        field: Field,
        x_t: Images,
        t: Times,
        velocity: Images,
        warm_up: Rate | float,
        sigma_data: float = 0.5,
    ) -> tuple[Images, Images]:
        """F, and g = cos t df/dt with its unstable part multiplied by `warm_up` (sCM).

        g = -cos^2 t (s F^- - dx/dt) - r (cos t sin t x_t + s J), where J is F's derivative along
        cos t sin t (dx/dt / s, 1) and s = sigma_data: the product with cos t sin t keeps it of order 1 at every t.
        """
        s, cos, sin = sigma_data, jnp.cos(t), jnp.sin(t)
        directions = (per_image(cos * sin) * velocity / s, cos * sin)
        prediction, derivative = jax.jvp(field, (x_t / s, t), directions)
        tangent = -per_image(cos**2) * (s * prediction - velocity) - warm_up * (
            per_image(cos * sin) * x_t + s * derivative
        )
        return prediction, tangent


@dataclasses.dataclass(frozen=True)
class ContinuousTraining(_ContinuousTime):
    """sCT: dx_t / dt = v_t = cos t sigma_data z - sin t x_0, from data alone."""

    def velocity(
        self, models: Models, frozen: FrozenParams, batch: Batch, x_t: Images, t: Times, noise: Images
    ) -> Images:
        del models, frozen, x_t
        return per_image(jnp.cos(t)) * noise - per_image(jnp.sin(t)) * batch.images


@dataclasses.dataclass(frozen=True)
class ContinuousDistillation(_ContinuousTime):
    """sCD: dx_t / dt = sigma_data F_teacher(x_t / sigma_data, t), along the teacher's probability flow."""

    has_teacher: ClassVar[bool] = True

    def check(self, models: Models) -> None:
        super().check(models)
        if models.teacher is None:
            return
        ours, theirs = (trigflow_scaling(f).sigma_data for f in (models.student, models.teacher))
        if ours != theirs:
            raise InputError(f"Student and teacher must agree on sigma_data; got {ours} and {theirs}.")

    def velocity(
        self, models: Models, frozen: FrozenParams, batch: Batch, x_t: Images, t: Times, noise: Images
    ) -> Images:
        del noise
        teacher, teacher_params = self.teacher(models, frozen)
        sigma_data = trigflow_scaling(teacher).sigma_data
        return sigma_data * trigflow_field(teacher, teacher_params, batch.labels)(x_t / sigma_data, t)


def trigflow_field(
    function: ConsistencyFunction, params: Params, labels: Labels | None = None, dropout_keys: Keys | None = None
) -> Field:
    """TrigFlow's F(x_t / sigma_data, t), which is minus the raw network at c_noise(sigma_data tan t)."""

    def field(u: Images, t: Times) -> Images:
        sigma: Sigmas = sigma_at_trigflow_time(t, trigflow_scaling(function).sigma_data)
        return -function.network.predict(params, u, function.preconditioning.c_noise(sigma), labels, dropout_keys)

    return field


def trigflow_scaling(function: ConsistencyFunction) -> EDMPreconditioning:
    """The scaling of a student or teacher. Raises InputError where it is none of TrigFlow's."""
    if not isinstance(function.preconditioning, EDMPreconditioning):
        raise InputError(
            f"Continuous-time objectives need f(x, 0) = x, got {type(function.preconditioning).__name__}. "
            "Use EDMPreconditioning (to tune an EDM denoiser) or TrigFlowPreconditioning, for student and teacher."
        )
    return function.preconditioning
