"""Consistency training without a teacher (CM, algorithm 3)."""

import dataclasses

from cm_jax.diffusion.curricula import Curriculum, Progressive
from cm_jax.diffusion.distances import Distance, Squared
from cm_jax.diffusion.noise_distributions import IndexDistribution, UniformIndex
from cm_jax.diffusion.weightings import Uniform, Weighting
from cm_jax.objectives.base import AdjacentPairObjective


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(AdjacentPairObjective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) for adjacent levels t > r of N(k)."""

    curriculum: Curriculum = Progressive()
    noise_distribution: IndexDistribution = UniformIndex()
    weighting: Weighting = Uniform()
    distance: Distance = Squared()
