"""Training of a denoiser, such as the teacher of a distillation (EDM)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.distances import Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.weightings import AnyWeighting, Karras
from cm_jax.objectives.base import DistanceObjective, Inputs, Losses, Metrics
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Params, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class Denoising(DistanceObjective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    noise_distribution: LogNormal = LogNormal()
    weighting: AnyWeighting = Karras()
    distance: AnyDistance = Squared()

    makes_denoiser: ClassVar[bool] = True

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        sigma = self.noise_distribution(inputs.level_keys)
        perceptual, sigma_data = inputs.frozen.perceptual, inputs.models.student.preconditioning.sigma_data
        losses = self.losses(inputs.student(), inputs.batch.images, sigma, inputs.noise, perceptual, sigma_data)
        return losses, {"sigma": sigma}

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
