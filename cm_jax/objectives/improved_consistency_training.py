"""Improved consistency training (iCT)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import AnyCurriculum, Doubling
from cm_jax.diffusion.losses import AnyWeighting, InverseGap, PseudoHuber
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution, DiscreteLogNormal
from cm_jax.objectives.consistency_training import ConsistencyTraining
from cm_jax.objectives.distances import AnyDistance


@dataclasses.dataclass(frozen=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """Consistency training with doubling N, log-normal levels, weight 1 / (t - r) and the pseudo-Huber distance.

    The target is always the student itself without gradient, because an EMA target biases the limit (iCT, section 3.2).
    """

    curriculum: AnyCurriculum = Doubling()
    noise_distribution: AnyIndexDistribution = DiscreteLogNormal()
    weighting: AnyWeighting = InverseGap()
    distance: AnyDistance = PseudoHuber()

    has_target: ClassVar[bool] = False
