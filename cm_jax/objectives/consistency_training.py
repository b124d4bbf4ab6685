"""Consistency training without a teacher (CM, algorithm 3)."""

import dataclasses

from cm_jax.objectives.base import AdjacentPairObjective


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(AdjacentPairObjective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) for adjacent levels t > r of N(k)."""
