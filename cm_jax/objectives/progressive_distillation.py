"""Progressive distillation: one step of the student for two of its teacher (Salimans and Ho 2022, algorithm 2)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.curricula import Curriculum, Halving, Step
from cm_jax.diffusion.distances import Distance, Squared
from cm_jax.diffusion.noise_distributions import IndexDistribution, UniformIndex
from cm_jax.diffusion.noise_schedule import KarrasCurve
from cm_jax.diffusion.ode import EulerStep
from cm_jax.diffusion.weightings import TruncatedSNR, Weighting
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models, Objective, split_keys
from cm_jax.types import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image


@dataclasses.dataclass(frozen=True)
class ProgressiveDistillation(Objective):
    """w(t) d(D(x_t, t), x^), where one Euler step with x^ from t to r ends where two of the teacher do.

    Student and teacher are both EDM denoisers. At the end of a stage the student becomes the teacher: the training step
    hands over its parameters.
    """

    curriculum: Curriculum = Halving()
    """N(k) counts steps here, not levels: the grid has N + 1 levels."""
    curve: KarrasCurve = KarrasCurve()
    noise_distribution: IndexDistribution = UniformIndex()
    weighting: Weighting = TruncatedSNR()
    distance: Distance = Squared()

    has_teacher: ClassVar[bool] = True
    makes_denoiser: ClassVar[bool] = True
    hands_over: ClassVar[bool] = True

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        key_level, key_noise, key_dropout = split_keys(keys)
        levels = self.curriculum(step) + 1
        index = self.noise_distribution(key_level, self.curve, levels)
        t, middle, r = (self.curve.sigma(index + ahead, levels) for ahead in (0, 0.5, 1))
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        student = models.student.denoiser(params, batch.labels, key_dropout)
        teacher, teacher_params = self.teacher(models, frozen)
        denoiser = teacher.denoiser(teacher_params, batch.labels)
        losses = self.losses(student, denoiser, batch.images, t, middle, r, noise, frozen.perceptual)
        return losses, {"sigma": t, "levels": jnp.full_like(t, levels)}

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        images: Images,
        t: Sigmas,
        middle: Sigmas,
        r: Sigmas,
        noise: Images,
        perceptual: Params | None = None,
    ) -> Losses:
        x_t = images + per_image(t) * noise
        euler = EulerStep()
        x_r = euler(teacher, euler(teacher, x_t, t, middle), middle, r)
        clean = jax.lax.stop_gradient(x_t - per_image(t / (r - t)) * (x_r - x_t))
        return self.weighting(t, r) * self.distance.with_weights(perceptual)(student(x_t, t), clean)
