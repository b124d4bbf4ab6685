"""Consistency training without a teacher (CM, algorithm 3)."""

import dataclasses

from cm_jax.diffusion.curricula import AnyCurriculum, Progressive
from cm_jax.diffusion.distances import Squared
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution, UniformIndex
from cm_jax.diffusion.weightings import AnyWeighting, Uniform
from cm_jax.objectives.base import AdjacentPairObjective
from cm_jax.objectives.distances import AnyDistance


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(AdjacentPairObjective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) for adjacent levels t > r of N(k)."""

    curriculum: AnyCurriculum = Progressive()
    noise_distribution: AnyIndexDistribution = UniformIndex()
    weighting: AnyWeighting = Uniform()
    distance: AnyDistance = Squared()
