"""Distances d(x, y) between images: those of diffusion/losses.py, at another size, and LPIPS."""

import dataclasses

from cm_jax.diffusion.losses import Absolute, Distance, PseudoHuber, Squared, Values, resize_bilinear
from cm_jax.errors import InputError
from cm_jax.feature_networks.lpips import LPIPS
from cm_jax.types import Images, Params


@dataclasses.dataclass(frozen=True)
class Resized(Distance):
    """Another distance between both images at size x size, smaller or larger (bilinear, as PyTorch).

    Resized(Squared(), 32) is "l2-32" in OpenAI's implementation.
    """

    distance: "AnyDistance" = Squared()
    """Distance between the resized images."""
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


AnyDistance = Absolute | Squared | PseudoHuber | Resized | LPIPS | Distance
"""`Distance` admits one that has its weights (LPIPS during training), and registered ones."""
