"""Training of a denoiser, such as the teacher of a distillation (EDM)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.losses import AnyWeighting, Karras, Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.objectives.base import AnyDistance, Inputs, Losses, Metrics, Objective
from cm_jax.types import Denoiser, Images, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    noise_distribution: LogNormal = LogNormal()
    weighting: AnyWeighting = Karras()
    distance: AnyDistance = Squared()  # type: ignore[override]  # a field in place of the property

    makes_denoiser: ClassVar[bool] = True

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        sigma = self.noise_distribution(inputs.level_keys)
        losses = self.losses(inputs.student(), inputs.batch.images, sigma, inputs.noise, inputs.sigma_data)
        return losses, {"sigma": sigma}

    def losses(
        self, denoiser: Denoiser, images: Images, sigma: Sigmas, noise: Images, sigma_data: float = 0.5
    ) -> Losses:
        estimate = denoiser(images + per_image(sigma) * noise, sigma)
        return self.weighting(sigma, 0 * sigma, sigma_data) * self.distance(estimate, images)
