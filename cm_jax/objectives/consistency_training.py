"""Consistency training without a teacher (CM, algorithm 3)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.arrays import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image
from cm_jax.curricula import Curriculum, Progressive, Step
from cm_jax.distances import Distance, Squared
from cm_jax.noise_laws import IndexLaw, UniformIndex
from cm_jax.noise_levels import KarrasCurve
from cm_jax.objectives.base import Batch, Functions, Helpers, Losses, Metrics, Objective, draws
from cm_jax.weightings import Uniform, Weighting


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(Objective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) for neighbours t = s_i > r = s_{i+1} on a grid of N(k) levels."""

    curriculum: Curriculum = Progressive()
    curve: KarrasCurve = KarrasCurve()
    law: IndexLaw = UniformIndex()
    weighting: Weighting = Uniform()
    distance: Distance = Squared()

    has_target: ClassVar[bool] = True

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
        losses = self.losses(student, target, batch.images, t, r, noise, helpers.perceptual)
        return losses, {"sigma": t, "levels": jnp.full_like(t, levels)}

    def losses(
        self,
        student: Denoiser,
        target: Denoiser,
        images: Images,
        t: Sigmas,
        r: Sigmas,
        noise: Images,
        perceptual: Params | None = None,
    ) -> Losses:
        ahead = student(images + per_image(t) * noise, t)
        behind = jax.lax.stop_gradient(target(images + per_image(r) * noise, r))
        return self.weighting(t, r) * self.distance.with_weights(perceptual)(ahead, behind)
