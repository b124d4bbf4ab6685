"""A weight of the losses that is learnt along with the network."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.networks.layers import sinusoid
from cm_jax.types import Params

Values = Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """w of e^w loss - w, one linear layer on the sinusoids of the network's clock (sCM; EDM2 calls -w its u).

    Where it has learnt, e^-w is the mean loss at a level, so that all levels pull alike. It ends with training.
    """

    width: int = 128

    NAME: ClassVar[str] = "adaptive_weight"
    """Of its branch in the parameter tree."""

    def initialize(self) -> Params:
        return {self.NAME: {"kernel": jnp.zeros((self.width,)), "bias": jnp.zeros(())}}

    def __call__(self, params: Params, c_noise: Values) -> Values:
        own = params[self.NAME]
        return sinusoid(c_noise, self.width) @ own["kernel"] + own["bias"]


def without_weight(params: Params) -> Params:
    """The network's own parameters."""
    return {name: branch for name, branch in params.items() if name != AdaptiveWeight.NAME}
