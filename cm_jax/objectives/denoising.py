"""Training of a denoiser, the teacher (EDM)."""

import dataclasses
from typing import ClassVar

from cm_jax.arrays import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image
from cm_jax.curricula import Step
from cm_jax.distances import Distance, Squared
from cm_jax.noise_laws import LogNormal
from cm_jax.objectives.base import Batch, Functions, Helpers, Losses, Metrics, Objective, draws
from cm_jax.weightings import Karras, Weighting


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    law: LogNormal = LogNormal()
    weighting: Weighting = Karras()
    distance: Distance = Squared()

    makes_denoiser: ClassVar[bool] = True

    def evaluate(
        self, functions: Functions, params: Params, helpers: Helpers, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        del step
        key_level, key_noise, key_dropout = draws(keys)
        sigma = self.law(key_level)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        denoiser = functions.student.denoiser(params, batch.labels, key_dropout)
        losses = self.losses(denoiser, batch.images, sigma, noise, helpers.perceptual)
        return losses, {"sigma": sigma}

    def losses(
        self, denoiser: Denoiser, images: Images, sigma: Sigmas, noise: Images, perceptual: Params | None = None
    ) -> Losses:
        estimate = denoiser(images + per_image(sigma) * noise, sigma)
        return self.weighting(sigma, 0 * sigma) * self.distance.with_weights(perceptual)(estimate, images)
