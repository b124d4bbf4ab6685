"""Progressive distillation: one student step for two teacher steps (Salimans and Ho 2022, algorithm 2)."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.curricula import AnyCurriculum, Halving
from cm_jax.diffusion.losses import AnyWeighting, Squared, TruncatedSNR
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution, UniformIndex
from cm_jax.diffusion.ode import dx_dsigma, euler_step
from cm_jax.objectives.base import Inputs, Losses, Metrics, Objective
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class ProgressiveDistillation(Objective):
    """w(t) d(D(x_t, t), x^), where one Euler step from t to r with x^ equals two Euler steps of the teacher.

    Student and teacher are EDM denoisers. After each stage of the curriculum the student becomes the teacher.
    """

    curriculum: AnyCurriculum = Halving()  # type: ignore[override]  # a field in place of the property
    """N(k) is the number of sampling steps, between N + 1 noise levels."""
    noise_distribution: AnyIndexDistribution = UniformIndex()
    """Distribution of the pairs of adjacent noise levels."""
    weighting: AnyWeighting = TruncatedSNR()
    """Weight w of the loss as a function of the noise levels."""
    distance: AnyDistance = Squared()  # type: ignore[override]
    """Distance d between images."""

    has_teacher: ClassVar[bool] = True
    makes_denoiser: ClassVar[bool] = True
    replaces_teacher: ClassVar[bool] = True

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        num_levels, schedule = self.curriculum(inputs.step) + 1, inputs.models.student.schedule
        index = self.noise_distribution(inputs.level_keys, schedule, num_levels)
        t, middle, r = (schedule.sigma(index + offset, num_levels) for offset in (0, 0.5, 1))
        student, teacher, images = inputs.student(), inputs.teacher(), inputs.batch.images
        losses = self.losses(student, teacher, images, t, middle, r, inputs.noise, inputs.sigma_data)
        return losses, {"sigma": t, "levels": jnp.full_like(t, num_levels)}

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        images: Images,
        t: Sigmas,
        middle: Sigmas,
        r: Sigmas,
        noise: Images,
        sigma_data: float = 0.5,
    ) -> Losses:
        x_t, derivative = images + per_image(t) * noise, functools.partial(dx_dsigma, teacher)
        x_r = euler_step(derivative, euler_step(derivative, x_t, t, middle), middle, r)
        clean = jax.lax.stop_gradient(x_t - per_image(t / (r - t)) * (x_r - x_t))
        return self.weighting(t, r, sigma_data) * self.distance(student(x_t, t), clean)
