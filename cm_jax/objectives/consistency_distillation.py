"""Consistency distillation (CM, algorithm 2)."""

import dataclasses
from typing import ClassVar

from cm_jax.diffusion.curricula import Constant, Curriculum
from cm_jax.diffusion.distances import Distance, Squared
from cm_jax.diffusion.noise_distributions import IndexDistribution, UniformIndex
from cm_jax.diffusion.ode import HeunStep, ODEStep
from cm_jax.diffusion.weightings import Uniform, Weighting
from cm_jax.objectives.base import AdjacentPairObjective
from cm_jax.types import Denoiser, Images, Sigmas


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(AdjacentPairObjective):
    """w(t, r) d(f(x_t, t), f^-(x_r, r)), where one step of the teacher's ODE solver leads from x_t to x_r."""

    curriculum: Curriculum = Constant(40)
    noise_distribution: IndexDistribution = UniformIndex()
    solver: ODEStep = HeunStep()
    weighting: Weighting = Uniform()
    distance: Distance = Squared()

    has_teacher: ClassVar[bool] = True

    def x_r(self, teacher: Denoiser | None, images: Images, noise: Images, x_t: Images, t: Sigmas, r: Sigmas) -> Images:
        assert teacher is not None
        return self.solver(teacher, x_t, t, r)
