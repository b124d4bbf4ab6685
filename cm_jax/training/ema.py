"""Exponential moving averages (EMA) of the parameters over training.

ema <- beta ema + (1 - beta) params after every step, with 1 - beta = weight_at(k) for k = 0, 1, ...
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cm_jax.checkpoints import power_profiles
from cm_jax.diffusion.curricula import Rate, Step
from cm_jax.errors import InputError
from cm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ConstantEMA:
    """EMA with a constant decay beta."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"Expected an EMA decay in [0, 1), got {self.decay}.")

    @property
    def name(self) -> str:
        """Key in the training state."""
        return f"exponential_{self.decay!r}"

    def weight_at(self, step: Step) -> Rate:
        return jnp.float32(1 - self.decay)


@dataclasses.dataclass(frozen=True)
class PowerEMA:
    """Power-function EMA, beta = (1 - 1 / (k + 1))^(gamma + 1): the weight of step i grows as i^gamma (EDM2, sec. 3.1).

    It averages over a constant fraction of the training so far, and its initial value has no weight.
    """

    width: float = 0.05
    """Standard deviation of the weights over the steps, relative to the number of steps: 0.05 or 0.10 in EDM2. At most
    0.288, a uniform average."""

    def __post_init__(self) -> None:
        least, most = power_profiles.WIDTHS
        if not least <= self.width <= most:
            raise InputError(
                f"Expected a power-function EMA of relative width in [{least}, {most:.3f}], got {self.width}."
            )

    @property
    def name(self) -> str:
        return f"power_{self.width!r}"

    @property
    def gamma(self) -> float:
        """Exponent of the weights."""
        return power_profiles.gamma(self.width)

    def weight_at(self, step: Step) -> Rate:
        """1 - beta, without the cancellation that rounding beta to float32 would cause in long runs."""
        return -jnp.expm1((self.gamma + 1) * jnp.log1p(-1 / (jnp.asarray(step, jnp.float32) + 1)))


AnyEMA = ConstantEMA | PowerEMA


def decay_for_half_life(images: float, batch_size: int) -> float:
    """EMA decay with a half-life of `images`. OpenAI's is 0.9999432: 50 million images at batch size 4096."""
    return math.exp(math.log(0.5) * batch_size / images)


def ema_update(ema: Params, params: Params, weight: Rate | float) -> Params:
    """(1 - weight) ema + weight params, leaf by leaf; a weight of 0 leaves `ema` bitwise identical."""
    return jax.tree.map(lambda old, new: old + weight * (new - old), ema, params)
