"""Training of a denoiser, the teacher (EDM)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import Step
from cm_jax.diffusion.distances import Distance, Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.weightings import Karras, Weighting
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models, Objective, split_keys
from cm_jax.types import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    noise_distribution: LogNormal = LogNormal()
    weighting: Weighting = Karras()
    distance: Distance = Squared()

    makes_denoiser: ClassVar[bool] = True

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        del step
        key_level, key_noise, key_dropout = split_keys(keys)
        sigma = self.noise_distribution(key_level)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        denoiser = models.student.denoiser(params, batch.labels, key_dropout)
        losses = self.losses(denoiser, batch.images, sigma, noise, frozen.perceptual)
        return losses, {"sigma": sigma}

    def losses(
        self, denoiser: Denoiser, images: Images, sigma: Sigmas, noise: Images, perceptual: Params | None = None
    ) -> Losses:
        estimate = denoiser(images + per_image(sigma) * noise, sigma)
        return self.weighting(sigma, 0 * sigma) * self.distance.with_weights(perceptual)(estimate, images)
