"""Improved consistency training (iCT)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import Curriculum, Doubling, Step
from cm_jax.diffusion.distances import Distance, PseudoHuber
from cm_jax.diffusion.noise_distributions import DiscreteLogNormal, IndexDistribution
from cm_jax.diffusion.weightings import InverseGap, Weighting
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models
from cm_jax.objectives.consistency_training import ConsistencyTraining
from cm_jax.types import Keys, Params


@dataclasses.dataclass(frozen=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """Consistency training with a doubling grid, log-normal levels, weight 1 / (t - r) and the pseudo-Huber distance.

    The target is always the student itself, held fixed: with an average the limit is another one (iCT, section 3.2).
    """

    curriculum: Curriculum = Doubling()
    noise_distribution: IndexDistribution = DiscreteLogNormal()
    weighting: Weighting = InverseGap()
    distance: Distance = PseudoHuber()

    has_target: ClassVar[bool] = False

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        return super().evaluate(models, params, frozen._replace(target=None), batch, keys, step)
