"""Laws of the noise levels that training draws. Every image draws from its own key, so devices do not matter."""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from cm_jax.diffusion.noise_schedule import KarrasCurve
from cm_jax.errors import InputError
from cm_jax.types import Keys, Sigmas, normal_per_image

Indices = Int[Array, " b"]
Times = Float[Array, " b"]


def _demand_positive(noise_distribution: object, std: float) -> None:
    if not std > 0:
        raise InputError(f"{noise_distribution} is not a law: its deviation must be positive.")


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, deviation^2): (-1.2, 1.2) for denoisers (EDM, table 1), (-1.1, 2) for ECT."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _demand_positive(self, self.std)

    def __call__(self, keys: Keys) -> Sigmas:
        return jnp.exp(self.mean + self.std * normal_per_image(keys, ()))


class IndexDistribution(abc.ABC):
    """A law of i in 0 ... N - 2, the noisier end of an interval of a grid of N levels; N may be traced."""

    @abc.abstractmethod
    def __call__(self, keys: Keys, curve: KarrasCurve, levels: Any) -> Indices: ...


@dataclasses.dataclass(frozen=True)
class UniformIndex(IndexDistribution):
    """Every interval alike (CM, algorithms 2 and 3)."""

    def __call__(self, keys: Keys, curve: KarrasCurve, levels: Any) -> Indices:
        del curve
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, levels - 1))(keys)


@dataclasses.dataclass(frozen=True)
class DiscreteLogNormal(IndexDistribution):
    """Every interval by its mass under ln sigma ~ N(mean, deviation^2), as erf differences give it (iCT, section 3.5).

    A level is drawn from the normal law cut at the grid's ends, and the interval is the one that it falls in: the same
    law, without an array of N probabilities, so that N may be traced.
    """

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        _demand_positive(self, self.std)

    def __call__(self, keys: Keys, curve: KarrasCurve, levels: Any) -> Indices:
        low, high = ((math.log(edge) - self.mean) / self.std for edge in (curve.sigma_min, curve.sigma_max))
        drawn = jax.vmap(lambda key: jax.random.truncated_normal(key, low, high))(keys)
        index = jnp.floor(curve.index(jnp.exp(self.mean + self.std * drawn), levels)).astype(jnp.int32)
        return jnp.clip(index, 0, levels - 2)

    def probabilities(self, curve: KarrasCurve, levels: int) -> Float[Array, " n"]:
        """P(i) for i = 0 ... N - 2, from the erf differences themselves."""
        edges = norm.cdf((jnp.log(curve.sigma(jnp.arange(levels), levels)) - self.mean) / self.std)
        return (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """logit t ~ N(mean, deviation^2), on the straight path from t = 0 (data) to t = 1 (noise)."""

    mean: float = -0.4
    std: float = 1.0

    def __post_init__(self) -> None:
        _demand_positive(self, self.std)

    def __call__(self, keys: Keys) -> Times:
        return jax.nn.sigmoid(self.mean + self.std * normal_per_image(keys, ()))


@dataclasses.dataclass(frozen=True)
class IntervalDistribution(abc.ABC):
    """A law of the intervals [r, t] of MeanFlow; a share of them is a point, where it is flow matching."""

    t: LogitNormal = LogitNormal()
    r: LogitNormal = LogitNormal()
    points: float = 0.75
    """Share of r = t."""

    def __post_init__(self) -> None:
        if not 0 <= self.points <= 1:
            raise InputError(f"The share of points r = t must lie in [0, 1], got {self.points}.")

    def __call__(self, keys: Keys) -> tuple[Times, Times]:
        """(t, r) with r <= t."""
        key_t, key_r, key_point = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        t, r = self.ordered(self.t(key_t), self.r(key_r))
        point = jax.vmap(lambda key: jax.random.bernoulli(key, self.points))(key_point)
        return t, jnp.where(point, t, r)

    @abc.abstractmethod
    def ordered(self, t: Times, r: Times) -> tuple[Times, Times]: ...


@dataclasses.dataclass(frozen=True)
class SortedInterval(IntervalDistribution):
    """The greater of two draws is t, the smaller one r: MeanFlow for ImageNet."""

    def ordered(self, t: Times, r: Times) -> tuple[Times, Times]:
        return jnp.maximum(t, r), jnp.minimum(t, r)


@dataclasses.dataclass(frozen=True)
class CappedInterval(IntervalDistribution):
    """t keeps its own law, and r is at most t: what MeanFlow's authors use for CIFAR-10."""

    t: LogitNormal = LogitNormal(-0.6, 1.6)
    r: LogitNormal = LogitNormal(-4.0, 1.6)
    points: float = 0.25

    def ordered(self, t: Times, r: Times) -> tuple[Times, Times]:
        return t, jnp.minimum(t, r)
