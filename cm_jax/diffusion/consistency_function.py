"""A network with its preconditioning and noise schedule, as one function f(params, x, sigma, labels)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import Preconditioning
from cm_jax.types import Denoiser, Images, Keys, Labels, Network, Params, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class ConsistencyFunction:
    """f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))      (CM, eq. 5; EDM, eq. 7).

    With ConsistencyPreconditioning it is a consistency function, f(x, sigma_min) = x; with EDMPreconditioning it is the
    denoiser D. sigma_min is the schedule's.
    """

    network: Network
    preconditioning: Preconditioning
    schedule: KarrasSchedule = KarrasSchedule()

    def __call__(
        self,
        params: Params,
        x: Images,
        sigma: Sigmas,
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        until: Sigmas | None = None,
        guidance: Float[Array, ""] | Sigmas | None = None,
        augmentation: Float[Array, "b a"] | None = None,
    ) -> Images:
        """Images x with noise of standard deviation sigma, one level per image -> estimates of the clean images.

        until: for a network with interval_embedding, the level to which an Euler step with the result leads along the
        trajectory of the probability-flow ODE; None: the whole way to the data. guidance: strengths,
        for a network with guidance_embedding. augmentation: parameters of the images' augmentation, for a network with
        augment_dim; None: no augmentation.
        """
        c_in, c_noise = self.preconditioning.c_in(sigma), self.preconditioning.c_noise(sigma)
        length = None if until is None else self.preconditioning.c_interval(sigma, until)
        given = {} if guidance is None else {"guidance": jnp.broadcast_to(guidance, sigma.shape)}
        given |= {} if augmentation is None else {"augmentation": augmentation}
        raw = self.network.predict(params, per_image(c_in) * x, c_noise, labels, dropout_keys, length, **given)
        return self.preconditioning.blend(x, sigma, raw, self.schedule.sigma_min)

    def denoiser(
        self,
        params: Params,
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        guidance: Float[Array, ""] | Sigmas | None = None,
        augmentation: Float[Array, "b a"] | None = None,
    ) -> Denoiser:
        """(x, sigma) -> f(params, x, sigma, labels), with everything else closed over; `until` is an optional third."""
        return lambda x, sigma, until=None: self(params, x, sigma, labels, dropout_keys, until, guidance, augmentation)
