"""Distributions of the noise levels in training. Each image has its own key, so results do not depend on sharding."""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.types import Keys, Sigmas, normal_per_image, split_keys

Indices = Int[Array, " b"]
Times = Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class _Normal:
    """N(mean, std^2), of which a function is sampled."""

    mean: float
    """Mean of the normal distribution."""
    std: float
    """Standard deviation of the normal distribution."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise InputError(f"Expected a positive std, got {self.std}.")

    def normal(self, keys: Keys) -> Float[Array, " b"]:
        return self.mean + self.std * normal_per_image(keys, ())


@dataclasses.dataclass(frozen=True)
class LogNormal(_Normal):
    """ln sigma ~ N(mean, std^2): (-1.2, 1.2) for denoisers (EDM, table 1), (-1.1, 2) for ECT."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, keys: Keys) -> Sigmas:
        return jnp.exp(self.normal(keys))


class IndexDistribution(abc.ABC):
    """A distribution of i in 0 ... N - 2, where levels i and i + 1 of N are a pair; N may be traced."""

    @abc.abstractmethod
    def __call__(self, keys: Keys, schedule: KarrasSchedule, num_levels: Any) -> Indices: ...


@dataclasses.dataclass(frozen=True)
class UniformIndex(IndexDistribution):
    """Uniform over all pairs (CM, algorithms 2 and 3)."""

    def __call__(self, keys: Keys, schedule: KarrasSchedule, num_levels: Any) -> Indices:
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_levels - 1))(keys)


@dataclasses.dataclass(frozen=True)
class DiscreteLogNormal(_Normal, IndexDistribution):
    """P(i) is the mass of the interval between levels i and i + 1 under ln sigma ~ N(mean, std^2) (iCT, section 3.5).

    Samples ln sigma from the normal distribution truncated to [sigma_min, sigma_max] and returns the interval that
    contains it. This equals the paper's erf differences and needs no array of N probabilities, so N may be traced.
    """

    mean: float = -1.1
    std: float = 2.0

    def __call__(self, keys: Keys, schedule: KarrasSchedule, num_levels: Any) -> Indices:
        low, high = ((math.log(edge) - self.mean) / self.std for edge in (schedule.sigma_min, schedule.sigma_max))
        sample = jax.vmap(lambda key: jax.random.truncated_normal(key, low, high))(keys)
        index = jnp.floor(schedule.index(jnp.exp(self.mean + self.std * sample), num_levels)).astype(jnp.int32)
        return jnp.clip(index, 0, num_levels - 2)

    def probabilities(self, schedule: KarrasSchedule, num_levels: int) -> Float[Array, " n"]:
        """P(i) for i = 0 ... N - 2, by erf differences."""
        edges = norm.cdf((jnp.log(schedule.sigma(jnp.arange(num_levels), num_levels)) - self.mean) / self.std)
        return (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])


AnyIndexDistribution = UniformIndex | DiscreteLogNormal | IndexDistribution


@dataclasses.dataclass(frozen=True)
class LogitNormal(_Normal):
    """logit t ~ N(mean, std^2), for t on the straight path from data (0) to noise (1)."""

    mean: float = -0.4
    std: float = 1.0

    def __call__(self, keys: Keys) -> Times:
        return jax.nn.sigmoid(self.normal(keys))


@dataclasses.dataclass(frozen=True)
class IntervalDistribution(abc.ABC):
    """A distribution of MeanFlow's intervals [r, t], 0 <= r <= t <= 1."""

    t: LogitNormal = LogitNormal()
    r: LogitNormal = LogitNormal()
    flow_matching_ratio: float = 0.75
    """Share of intervals with r = t, where the loss is that of flow matching."""

    def __post_init__(self) -> None:
        if not 0 <= self.flow_matching_ratio <= 1:
            raise InputError(f"Expected flow_matching_ratio in [0, 1], got {self.flow_matching_ratio}.")

    def __call__(self, keys: Keys) -> tuple[Times, Times]:
        """(t, r) with r <= t."""
        key_t, key_r, key_equal = split_keys(keys)
        t, r = self.ordered(self.t(key_t), self.r(key_r))
        equal = jax.vmap(lambda key: jax.random.bernoulli(key, self.flow_matching_ratio))(key_equal)
        return t, jnp.where(equal, t, r)

    @abc.abstractmethod
    def ordered(self, t: Times, r: Times) -> tuple[Times, Times]: ...


@dataclasses.dataclass(frozen=True)
class SortedInterval(IntervalDistribution):
    """t is the larger of two samples and r the smaller (MeanFlow for ImageNet)."""

    def ordered(self, t: Times, r: Times) -> tuple[Times, Times]:
        return jnp.maximum(t, r), jnp.minimum(t, r)


@dataclasses.dataclass(frozen=True)
class CappedInterval(IntervalDistribution):
    """t as sampled, and r = min(r, t) (MeanFlow's implementation for CIFAR-10)."""

    t: LogitNormal = LogitNormal(-0.6, 1.6)
    r: LogitNormal = LogitNormal(-4.0, 1.6)
    flow_matching_ratio: float = 0.25

    def ordered(self, t: Times, r: Times) -> tuple[Times, Times]:
        return t, jnp.minimum(t, r)


AnyIntervalDistribution = SortedInterval | CappedInterval | IntervalDistribution
