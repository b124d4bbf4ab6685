"""Easy consistency tuning: from a denoiser to a consistency model by shrinking the gap between t and r (ECT)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cm_jax.diffusion.curricula import ShrinkingGap, Step
from cm_jax.diffusion.distances import Distance, PseudoHuber
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.weightings import InverseGap, Weighting
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models, Objective, split_keys
from cm_jax.types import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image


@dataclasses.dataclass(frozen=True)
class EasyConsistencyTuning(Objective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) with r = r(t, k); f^- is x itself where r = 0      (ECT, algorithm 1).

    The defaults are those for CIFAR-10: the norm, weighted by 1 / (t - r). For ImageNet-64 it is the pseudo-Huber
    distance, weighted by 1 / c_out^2 (Karras). It starts from the weights of a denoiser, with its scalings.
    """

    noise_distribution: LogNormal = LogNormal(-1.1, 2.0)
    gap: ShrinkingGap = ShrinkingGap()
    weighting: Weighting = InverseGap()
    distance: Distance = PseudoHuber(0.0)

    has_target: ClassVar[bool] = True

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        key_level, key_noise, key_dropout = split_keys(keys)
        t = self.noise_distribution(key_level)
        r = self.gap(t, step)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        target_params = params if frozen.target is None else frozen.target
        student = models.student.denoiser(params, batch.labels, key_dropout)
        target = models.student.denoiser(target_params, batch.labels, key_dropout)
        losses = self.losses(student, target, batch.images, t, r, noise, frozen.perceptual)
        return losses, {"sigma": t, "ratio": r / t}

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
        behind = jnp.where(per_image(r) > 0, target(images + per_image(r) * noise, r), images)
        return self.weighting(t, r) * self.distance.with_weights(perceptual)(ahead, jax.lax.stop_gradient(behind))
