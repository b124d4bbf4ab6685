"""The distances that objectives accept, and `Resized`, which applies any of them at another resolution."""

import dataclasses

from cm_jax.diffusion.distances import Absolute, Distance, PseudoHuber, Squared, Values, resize_bilinear
from cm_jax.errors import InputError
from cm_jax.feature_networks.lpips import LPIPS
from cm_jax.types import Images, Params


@dataclasses.dataclass(frozen=True)
class Resized(Distance):
    """Another distance between both images at size x size, smaller or larger (bilinear, as PyTorch).

    Resized(Squared(), 32) is "l2-32" in OpenAI's implementation.
    """

    distance: "Absolute | Squared | PseudoHuber | Resized | LPIPS | Distance" = Squared()
    """`Distance` admits one that has its weights (LPIPS during training); files hold the others."""
    size: int = 32
    """Height and width in pixels."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"Images cannot be resized to {self.size} pixels: size must be at least 1.")

    def __call__(self, x: Images, y: Images) -> Values:
        return self.distance(resize_bilinear(x, self.size), resize_bilinear(y, self.size))

    def with_weights(self, params: Params | None) -> Distance:
        return dataclasses.replace(self, distance=self.distance.with_weights(params))

    def load_weights(self) -> Params | None:
        return self.distance.load_weights()


AnyDistance = Absolute | Squared | PseudoHuber | Resized | LPIPS
