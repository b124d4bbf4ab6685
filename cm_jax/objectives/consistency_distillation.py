"""Consistency distillation (CM, algorithm 2)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.curricula import Constant, Curriculum, Step
from cm_jax.diffusion.distances import Distance, Squared
from cm_jax.diffusion.noise_distributions import IndexDistribution, UniformIndex
from cm_jax.diffusion.noise_schedule import KarrasCurve
from cm_jax.diffusion.ode import HeunStep, ODEStep
from cm_jax.diffusion.weightings import Uniform, Weighting
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models, Objective, split_keys
from cm_jax.types import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(Objective):
    """w(t) d(f(x_t, t), f^-(x_r, r)), where the teacher's ODE leads from x_t at level t = s_i to x_r at r = s_{i+1}."""

    curriculum: Curriculum = Constant(40)
    curve: KarrasCurve = KarrasCurve()
    noise_distribution: IndexDistribution = UniformIndex()
    solver: ODEStep = HeunStep()
    weighting: Weighting = Uniform()
    distance: Distance = Squared()

    has_target: ClassVar[bool] = True
    has_teacher: ClassVar[bool] = True

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        key_level, key_noise, key_dropout = split_keys(keys)
        levels = self.curriculum(step)
        index = self.noise_distribution(key_level, self.curve, levels)
        t, r = self.curve.sigma(index, levels), self.curve.sigma(index + 1, levels)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        target_params = params if frozen.target is None else frozen.target
        student = models.student.denoiser(params, batch.labels, key_dropout)
        target = models.student.denoiser(target_params, batch.labels, key_dropout)
        teacher, teacher_params = self.teacher(models, frozen)
        denoiser = teacher.denoiser(teacher_params, batch.labels)
        losses = self.losses(student, target, denoiser, batch.images, t, r, noise, frozen.perceptual)
        return losses, {"sigma": t, "levels": jnp.full_like(t, levels)}

    def losses(
        self,
        student: Denoiser,
        target: Denoiser,
        teacher: Denoiser,
        images: Images,
        t: Sigmas,
        r: Sigmas,
        noise: Images,
        perceptual: Params | None = None,
    ) -> Losses:
        x_t = images + per_image(t) * noise
        x_r = self.solver(teacher, x_t, t, r)
        ahead = student(x_t, t)
        behind = jax.lax.stop_gradient(target(x_r, r))
        return self.weighting(t, r) * self.distance.with_weights(perceptual)(ahead, behind)
