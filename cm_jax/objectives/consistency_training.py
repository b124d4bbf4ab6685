"""Consistency training without a teacher (CM, algorithm 3)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.curricula import Curriculum, Progressive, Step
from cm_jax.diffusion.distances import Distance, Squared
from cm_jax.diffusion.noise_distributions import IndexDistribution, UniformIndex
from cm_jax.diffusion.noise_schedule import KarrasCurve
from cm_jax.diffusion.weightings import Uniform, Weighting
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models, Objective, split_keys
from cm_jax.types import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(Objective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) for neighbours t = s_i > r = s_{i+1} on a grid of N(k) levels."""

    curriculum: Curriculum = Progressive()
    curve: KarrasCurve = KarrasCurve()
    noise_distribution: IndexDistribution = UniformIndex()
    weighting: Weighting = Uniform()
    distance: Distance = Squared()

    has_target: ClassVar[bool] = True

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
        losses = self.losses(student, target, batch.images, t, r, noise, frozen.perceptual)
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
