"""Training of a denoiser, such as the teacher of a distillation (EDM)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from cm_jax.diffusion.losses import AnyWeighting, Karras, Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.errors import InputError
from cm_jax.networks.unet import UNet
from cm_jax.objectives.base import Inputs, Losses, Metrics, Models, Objective
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Network, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """w(sigma) d(D(x + sigma z, sigma), x)      (EDM, eq. 2)."""

    noise_distribution: LogNormal = LogNormal()
    weighting: AnyWeighting = Karras()
    """Weight w of the loss as a function of the noise levels."""
    distance: AnyDistance = Squared()  # type: ignore[override]  # a field in place of the property
    """Distance d between images."""
    uncertainty: bool = False
    """Train the network's uncertainty u as well, by the loss e^-u w d + u (EDM2, equation 21)."""

    makes_denoiser: ClassVar[bool] = True

    def check(self, models: Models) -> None:
        super().check(models)
        if self.uncertainty:
            _with_uncertainty(models.student.network)
        if self.uncertainty and self.adaptive:
            raise InputError("Denoising has two learned weights: leave out uncertainty or adaptive.")

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        sigma, student = self.noise_distribution(inputs.level_keys), inputs.models.student
        losses = self.losses(inputs.student(), inputs.batch.images, sigma, inputs.noise, inputs.sigma_data)
        if not self.uncertainty:
            return losses, {"sigma": sigma}
        c_noise = student.preconditioning.c_noise(sigma)
        u = _with_uncertainty(student.network).log_variance(inputs.params, c_noise)
        return jnp.exp(-u) * losses + u, {"sigma": sigma, "unweighted": losses, "log_weight": -u}

    def losses(
        self, denoiser: Denoiser, images: Images, sigma: Sigmas, noise: Images, sigma_data: float = 0.5
    ) -> Losses:
        estimate = denoiser(images + per_image(sigma) * noise, sigma)
        return self.weighting(sigma, 0 * sigma, sigma_data) * self.distance(estimate, images)


def _with_uncertainty(network: Network) -> UNet:
    """The same network. Raises InputError for one without an uncertainty head."""
    if not (isinstance(network, UNet) and network.uncertainty):
        raise InputError("Denoising with uncertainty needs a network with an uncertainty head: --network.uncertainty.")
    return network
