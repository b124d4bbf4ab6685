"""Consistency distillation (CM, algorithm 2)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.arrays import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image
from cm_jax.curricula import Constant, Curriculum, Step
from cm_jax.distances import Distance, Squared
from cm_jax.noise_laws import IndexLaw, UniformIndex
from cm_jax.noise_levels import KarrasCurve
from cm_jax.objectives.base import Batch, Functions, Helpers, Losses, Metrics, Objective, draws
from cm_jax.objectives.teacher_steps import HeunStep, TeacherStep
from cm_jax.weightings import Uniform, Weighting


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(Objective):
    """w(t) d(f(x_t, t), f^-(x_r, r)), where the teacher's ODE leads from x_t at level t = s_i to x_r at r = s_{i+1}."""

    curriculum: Curriculum = Constant(40)
    curve: KarrasCurve = KarrasCurve()
    law: IndexLaw = UniformIndex()
    solver: TeacherStep = HeunStep()
    weighting: Weighting = Uniform()
    distance: Distance = Squared()

    has_target: ClassVar[bool] = True
    has_teacher: ClassVar[bool] = True

    def evaluate(
        self, functions: Functions, params: Params, helpers: Helpers, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        key_level, key_noise, key_dropout = draws(keys)
        levels = self.curriculum(step)
        index = self.law(key_level, self.curve, levels)
        t, r = self.curve.sigma(index, levels), self.curve.sigma(index + 1, levels)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        target_params = params if helpers.target is None else helpers.target
        student = functions.student.denoiser(params, batch.labels, key_dropout)
        target = functions.student.denoiser(target_params, batch.labels, key_dropout)
        teacher, teacher_params = self.teacher(functions, helpers)
        denoiser = teacher.denoiser(teacher_params, batch.labels)
        losses = self.losses(student, target, denoiser, batch.images, t, r, noise, helpers.perceptual)
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
