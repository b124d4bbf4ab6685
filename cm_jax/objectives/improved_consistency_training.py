"""Improved consistency training (iCT)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import Curriculum, Doubling
from cm_jax.diffusion.distances import Distance, PseudoHuber
from cm_jax.diffusion.noise_distributions import DiscreteLogNormal, IndexDistribution
from cm_jax.diffusion.weightings import InverseGap, Weighting
from cm_jax.objectives.consistency_training import ConsistencyTraining


@dataclasses.dataclass(frozen=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """Consistency training with doubling N, log-normal levels, weight 1 / (t - r) and the pseudo-Huber distance.

    The target is always the student itself without gradient, because an EMA target biases the limit (iCT, section 3.2).
    """

    curriculum: Curriculum = Doubling()
    noise_distribution: IndexDistribution = DiscreteLogNormal()
    weighting: Weighting = InverseGap()
    distance: Distance = PseudoHuber()

    has_target: ClassVar[bool] = False
