"""Continuous-time consistency models in TrigFlow: training (sCT) and distillation (sCD) (sCM).

x_t = cos t x_0 + sin t sigma_data z, with t in [0, pi/2) and sigma = sigma_data tan t. The preconditioning is EDM's or
TrigFlow's: the network's input x_t / sigma_data at t equals c_in x at x = x_t / cos t and level sigma, and its output
is -F for TrigFlow's F. So the weights of an EDM denoiser are valid initial weights, and all samplers apply.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Rate, WarmUp
from cm_jax.diffusion.guidance import AnyGuidance
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.noise_schedule import sigma_at_trigflow_time, trigflow_time
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives.base import Inputs, Losses, Metrics, Models, Objective, require_forward_derivatives
from cm_jax.types import Images, Keys, Labels, Params, Sigmas, per_image

Times = Float[Array, " b"]
Field = Callable[[Images, Times], Images]
"""F: (x_t / sigma_data, t) -> the estimate of (dx_t / dt) / sigma_data."""


@dataclasses.dataclass(frozen=True)
class _ContinuousTime(Objective):
    """1 / d ||F - F^- - h||^2 with F^- = stop(F) and h of the tangent g, as `tangent_limit` says; sCM also has
    `adaptive`.
    """

    noise_distribution: LogNormal = LogNormal(-1.0, 1.4)
    """Of sigma = sigma_data tan t."""
    warm_up: WarmUp = WarmUp()
    regularizer: float = 0.1
    """c in g / (|g| + c); |g| is the root mean square, which does not depend on the image size."""
    tangent_limit: Literal["norm", "clip"] = "norm"
    """norm: h = g / (|g| + c). clip: h is g with every value limited to [-1, 1] (sCM, section 4.2)."""

    def __post_init__(self) -> None:
        if not self.regularizer > 0:
            raise InputError(f"Expected a positive regularizer of the tangent's norm, got {self.regularizer}.")

    def check(self, models: Models) -> None:
        super().check(models)
        functions = [models.student, models.teacher] if self.has_teacher else [models.student]
        sigma_data = [trigflow_preconditioning(function).sigma_data for function in functions if function is not None]
        if sigma_data[0] != sigma_data[-1]:
            raise InputError(f"Student and teacher need the same sigma_data; got {sigma_data[0]} and {sigma_data[1]}.")
        require_forward_derivatives(self, models.student)

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        images, student = inputs.batch.images, inputs.models.student
        sigma, sigma_data = self.noise_distribution(inputs.level_keys), student.preconditioning.sigma_data
        t, noise = trigflow_time(sigma, sigma_data), sigma_data * inputs.noise
        x_t = per_image(jnp.cos(t)) * images + per_image(jnp.sin(t)) * noise
        teacher = None
        if self.has_teacher:
            field_of = functools.partial(trigflow_field, *inputs.teacher_function())
            teacher = inputs.guided(functools.partial(field_of, augmentation=inputs.teacher_augmentation))
        velocity = self.velocity(teacher, images, noise, x_t, t, sigma_data)
        batch, guidance = inputs.batch, inputs.student_guidance
        field = trigflow_field(
            student, inputs.params, batch.labels, inputs.dropout_keys, guidance, augmentation=batch.augmentation
        )
        losses, tangent_norm = self.losses(field, x_t, t, velocity, self.warm_up(inputs.step), sigma_data)
        return losses, {"sigma": sigma, "tangent_norm": tangent_norm}

    @abc.abstractmethod
    def velocity(
        self, teacher: Field | None, images: Images, noise: Images, x_t: Images, t: Times, sigma_data: float
    ) -> Images:
        """dx_t / dt, for noise sigma_data z."""

    def losses(
        self, field: Field, x_t: Images, t: Times, velocity: Images, warm_up: Rate | float, sigma_data: float = 0.5
    ) -> tuple[Losses, Losses]:
        """Losses, and the root mean square of each tangent before it is limited."""
        output, tangent = self.tangent(field, x_t, t, velocity, warm_up, sigma_data)
        norm = jnp.sqrt(jnp.square(tangent).mean((1, 2, 3)))
        clipped = self.tangent_limit == "clip"
        limited = jnp.clip(tangent, -1, 1) if clipped else tangent / per_image(norm + self.regularizer)
        target = jax.lax.stop_gradient(output + limited)
        return jnp.square(output - target).mean((1, 2, 3)), norm

    def tangent(
        self, field: Field, x_t: Images, t: Times, velocity: Images, warm_up: Rate | float, sigma_data: float = 0.5
    ) -> tuple[Images, Images]:
        """F, and g = cos t df/dt with its unstable part multiplied by `warm_up` (sCM).

        g = -cos^2 t (s F^- - dx/dt) - r (cos t sin t x_t + s J), where s = sigma_data, r = warm_up, and J is F's
        derivative along cos t sin t (dx/dt / s, 1); the factor cos t sin t keeps J of order 1 at every t.
        """
        s, cos, sin = sigma_data, jnp.cos(t), jnp.sin(t)
        directions = (per_image(cos * sin) * velocity / s, cos * sin)
        output, derivative = jax.jvp(field, (x_t / s, t), directions)
        tangent = -per_image(cos**2) * (s * output - velocity) - warm_up * (per_image(cos * sin) * x_t + s * derivative)
        return output, tangent


@dataclasses.dataclass(frozen=True)
class ContinuousTraining(_ContinuousTime):
    """sCT: dx_t / dt = cos t sigma_data z - sin t x_0, from data alone."""

    def velocity(self, teacher, images, noise, x_t, t, sigma_data) -> Images:
        return per_image(jnp.cos(t)) * noise - per_image(jnp.sin(t)) * images


@dataclasses.dataclass(frozen=True)
class ContinuousDistillation(_ContinuousTime):
    """sCD: dx_t / dt = sigma_data F_teacher(x_t / sigma_data, t), along the teacher's probability flow.

    With `guidance`, the teacher is guided by itself without labels: F_ref + w (F - F_ref), as denoisers are.
    """

    guidance: AnyGuidance | None = None  # type: ignore[override]  # a field in place of the property
    """Guidance of the teacher, by its own output without labels. None: no guidance."""

    has_teacher: ClassVar[bool] = True

    def velocity(self, teacher, images, noise, x_t, t, sigma_data) -> Images:
        assert teacher is not None
        return sigma_data * teacher(x_t / sigma_data, t)


def trigflow_field(
    function: ConsistencyFunction,
    params: Params,
    labels: Labels | None = None,
    dropout_keys: Keys | None = None,
    guidance: Sigmas | None = None,
    augmentation: Float[Array, "b a"] | None = None,
) -> Field:
    """TrigFlow's F(x_t / sigma_data, t): minus the network's output at c_noise(sigma_data tan t)."""

    def field(u: Images, t: Times) -> Images:
        sigma = sigma_at_trigflow_time(t, trigflow_preconditioning(function).sigma_data)
        given = {} if guidance is None else {"guidance": guidance}
        given |= {} if augmentation is None else {"augmentation": augmentation}
        c_noise = function.preconditioning.c_noise(sigma)
        return -function.network.predict(params, u, c_noise, labels, dropout_keys, **given)

    return field


def trigflow_preconditioning(function: ConsistencyFunction) -> EDMPreconditioning:
    """The preconditioning of a student or teacher. Raises InputError unless it is EDM's or TrigFlow's."""
    if not isinstance(function.preconditioning, EDMPreconditioning):
        raise InputError(
            f"Continuous-time objectives need f(x, 0) = x, got {type(function.preconditioning).__name__}. "
            "Use EDMPreconditioning (to tune an EDM denoiser) or TrigFlowPreconditioning, for student and teacher."
        )
    return function.preconditioning
