"""A network and its scalings, bound into f(params, x, sigma, labels)."""

import dataclasses

from cm_jax.arrays import Denoiser, Images, Keys, Labels, Params, Sigmas, per_image
from cm_jax.networks import Network
from cm_jax.preconditioning import Scaling


@dataclasses.dataclass(frozen=True)
class ConsistencyFunction:
    """f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))      (CM, eq. 5; EDM, eq. 7).

    With BoundaryScaling it is a consistency function, f(x, sigma_min) = x; with EDMScaling it is the denoiser D.
    Nothing else asks which one it holds.
    """

    network: Network
    scaling: Scaling

    def __call__(
        self,
        params: Params,
        x: Images,
        sigma: Sigmas,
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
    ) -> Images:
        """Images x with noise of standard deviation sigma, one level per image -> estimates of the clean images."""
        raw = self.network.predict(
            params, per_image(self.scaling.c_in(sigma)) * x, self.scaling.c_noise(sigma), labels, dropout_keys
        )
        return self.scaling.blend(x, sigma, raw)

    def denoiser(self, params: Params, labels: Labels | None = None, dropout_keys: Keys | None = None) -> Denoiser:
        """(x, sigma) -> f(params, x, sigma, labels), with everything else closed over."""
        return lambda x, sigma: self(params, x, sigma, labels, dropout_keys)
