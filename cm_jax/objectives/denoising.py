"""Training of a denoiser, such as the teacher of a distillation (EDM)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import Step
from cm_jax.diffusion.distances import Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.weightings import AnyWeighting, Karras
from cm_jax.objectives.base import Batch, DistanceObjective, FrozenParams, Losses, Metrics, Models, split_keys
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Keys, Params, Sigmas, normal_per_image, per_image


@dataclasses.dataclass(frozen=True)
class Denoising(DistanceObjective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    noise_distribution: LogNormal = LogNormal()
    weighting: AnyWeighting = Karras()
    distance: AnyDistance = Squared()

    makes_denoiser: ClassVar[bool] = True

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        del step
        key_level, key_noise, key_dropout = split_keys(keys)
        sigma = self.noise_distribution(key_level)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        denoiser = models.student.denoiser(params, batch.labels, key_dropout)
        sigma_data = models.student.preconditioning.sigma_data
        return self.losses(denoiser, batch.images, sigma, noise, frozen.perceptual, sigma_data), {"sigma": sigma}

    def losses(
        self,
        denoiser: Denoiser,
        images: Images,
        sigma: Sigmas,
        noise: Images,
        perceptual: Params | None = None,
        sigma_data: float = 0.5,
    ) -> Losses:
        estimate = denoiser(images + per_image(sigma) * noise, sigma)
        return self.weighted_distance(sigma, 0 * sigma, estimate, images, perceptual, sigma_data)
