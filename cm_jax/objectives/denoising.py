"""Training of a denoiser, such as the teacher of a distillation (EDM)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.losses import AnyWeighting, Karras, Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.objectives.base import AnyDistance, DistanceObjective, Inputs, Losses, Metrics
from cm_jax.types import Denoiser, Images, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class Denoising(DistanceObjective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    noise_distribution: LogNormal = LogNormal()
    weighting: AnyWeighting = Karras()
    distance: AnyDistance = Squared()

    makes_denoiser: ClassVar[bool] = True

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        sigma = self.noise_distribution(inputs.level_keys)
        losses = self.losses(inputs.student(), inputs.batch.images, sigma, inputs.noise, inputs.sigma_data)
        return losses, {"sigma": sigma}

    def losses(
        self, denoiser: Denoiser, images: Images, sigma: Sigmas, noise: Images, sigma_data: float = 0.5
    ) -> Losses:
        estimate = denoiser(images + per_image(sigma) * noise, sigma)
        return self.weighted_distance(sigma, 0 * sigma, estimate, images, sigma_data)
