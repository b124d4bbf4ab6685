"""The learned weight of the noise levels."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from cm_jax.networks.layers import sinusoid
from cm_jax.types import Params, Sigmas


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """w(c_noise) in the loss e^w loss - w: one linear layer on sinusoids of c_noise (sCM; EDM2, where u = -w).

    At its optimum e^-w is the mean loss at each noise level. Its parameters are not part of the saved model.
    """

    width: int = 128
    """Number of sines and cosines of c_noise."""

    NAME: ClassVar[str] = "adaptive_weight"
    """Name of its branch in the parameter tree."""

    def initialize(self) -> Params:
        return {self.NAME: {"kernel": jnp.zeros((self.width,)), "bias": jnp.zeros(())}}

    def __call__(self, params: Params, c_noise: Sigmas) -> Sigmas:
        own = params[self.NAME]
        return sinusoid(c_noise, self.width) @ own["kernel"] + own["bias"]


def without_weight(params: Params) -> Params:
    """The network's parameters alone."""
    return {name: branch for name, branch in params.items() if name != AdaptiveWeight.NAME}
