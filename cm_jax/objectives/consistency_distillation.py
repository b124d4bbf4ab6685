"""Consistency distillation (CM, algorithm 2)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import AnyCurriculum, Constant
from cm_jax.diffusion.guidance import AnyGuidance
from cm_jax.diffusion.ode import AnyODEStep, HeunStep
from cm_jax.objectives.base import AdjacentPairObjective
from cm_jax.types import Images


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(AdjacentPairObjective):
    """w(t, r) d(f(x_t, t), f^-(x_r, r)), where one step of the teacher's ODE solver leads from x_t to x_r.

    With `guidance`, the teacher is guided by itself without labels.
    """

    curriculum: AnyCurriculum = Constant(40)
    solver: AnyODEStep = HeunStep()
    """Solver of the teacher's probability-flow ODE."""
    guidance: AnyGuidance | None = None  # type: ignore[override]  # a field in place of the property
    """Guidance of the teacher, by its own output without labels. None: no guidance."""

    has_teacher: ClassVar[bool] = True

    def x_r(self, teacher, images, noise, x_t, t, r) -> Images:
        assert teacher is not None
        return self.solver(teacher, x_t, t, r)
