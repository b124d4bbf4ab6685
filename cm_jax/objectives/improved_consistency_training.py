"""Improved consistency training (iCT)."""

import dataclasses
from typing import ClassVar

from cm_jax.arrays import Keys, Params
from cm_jax.curricula import Curriculum, Doubling, Step
from cm_jax.distances import Distance, PseudoHuber
from cm_jax.noise_laws import DiscreteLogNormal, IndexLaw
from cm_jax.objectives.base import Batch, Functions, Helpers, Losses, Metrics
from cm_jax.objectives.consistency_training import ConsistencyTraining
from cm_jax.weightings import InverseGap, Weighting


@dataclasses.dataclass(frozen=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """Consistency training with a doubling grid, log-normal levels, weight 1 / (t - r) and the pseudo-Huber distance.

    The target is always the student itself, held fixed: with an average the limit is another one (iCT, section 3.2).
    """

    curriculum: Curriculum = Doubling()
    law: IndexLaw = DiscreteLogNormal()
    weighting: Weighting = InverseGap()
    distance: Distance = PseudoHuber()

    has_target: ClassVar[bool] = False

    def evaluate(
        self, functions: Functions, params: Params, helpers: Helpers, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        return super().evaluate(functions, params, helpers._replace(target=None), batch, keys, step)
