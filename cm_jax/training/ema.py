"""Averages of the parameters over training: the weights that one samples from."""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax.diffusion.curricula import Rate, Step
from cm_jax.errors import InputError
from cm_jax.types import Params


class EMA(abc.ABC):
    """average <- beta average + (1 - beta) parameters, after every step, with beta = rate(k) at step k = 0, 1, ..."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Of its tree in the training state."""

    @abc.abstractmethod
    def rate(self, step: Step) -> Rate: ...


@dataclasses.dataclass(frozen=True)
class ConstantEMA(EMA):
    """beta is the same at every step."""

    beta: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise InputError(f"The rate of an exponential average must lie in [0, 1), got {self.beta}.")

    @property
    def name(self) -> str:
        return f"exponential_{self.beta!r}"

    def rate(self, step: Step) -> Rate:
        del step
        return jnp.float32(self.beta)


@dataclasses.dataclass(frozen=True)
class PowerEMA(EMA):
    """beta = (1 - 1 / (k + 1))^(gamma + 1): the weight of step i grows as i^gamma (EDM2, section 3.1).

    Its memory is a constant share of the training so far, and fresh parameters are forgotten at once.
    """

    width: float = 0.05
    """Standard deviation of the weights' distribution over the steps, relative to their number: 0.05 or 0.10 in EDM2.
    At most 0.288, an even average."""

    def __post_init__(self) -> None:
        if not 0.001 <= self.width <= 12**-0.5:
            raise InputError(
                f"The relative width of a power-function average must lie in [0.001, 0.288], got {self.width}."
            )

    @property
    def name(self) -> str:
        return f"power_{self.width!r}"

    @property
    def gamma(self) -> float:
        """The root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = width^2 that is not negative."""
        inverse = self.width**-2
        return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))

    def rate(self, step: Step) -> Rate:
        return (1 - 1 / (jnp.asarray(step, jnp.float32) + 1)) ** (self.gamma + 1)


def half_life(images: float, batch_size: int) -> float:
    """The beta that forgets half in so many images: 0.9999432 for 50 million at batch 4096, as the original has it."""
    return math.exp(math.log(0.5) * batch_size / images)


def averages_named(rates: tuple[float, ...], widths: tuple[float, ...]) -> tuple[EMA, ...]:
    """An exponential average for each rate, then a power-function average for each relative width."""
    return (*map(ConstantEMA, rates), *map(PowerEMA, widths))


def ema_update(average: Params, params: Params, rate: Rate | float) -> Params:
    """rate average + (1 - rate) params, leaf by leaf; written so that a rate of 1 changes no bit."""
    return jax.tree.map(lambda old, new: old + (1 - rate) * (new - old), average, params)
