"""Consistency distillation (CM, algorithm 2)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import AnyCurriculum, Constant
from cm_jax.diffusion.distances import Squared
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution, UniformIndex
from cm_jax.diffusion.ode import AnyODEStep, HeunStep
from cm_jax.diffusion.weightings import AnyWeighting, Uniform
from cm_jax.objectives.base import AdjacentPairObjective
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Sigmas


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(AdjacentPairObjective):
    """w(t, r) d(f(x_t, t), f^-(x_r, r)), where one step of the teacher's ODE solver leads from x_t to x_r."""

    curriculum: AnyCurriculum = Constant(40)
    noise_distribution: AnyIndexDistribution = UniformIndex()
    solver: AnyODEStep = HeunStep()
    weighting: AnyWeighting = Uniform()
    distance: AnyDistance = Squared()

    has_teacher: ClassVar[bool] = True

    def x_r(self, teacher: Denoiser | None, images: Images, noise: Images, x_t: Images, t: Sigmas, r: Sigmas) -> Images:
        assert teacher is not None
        return self.solver(teacher, x_t, t, r)
