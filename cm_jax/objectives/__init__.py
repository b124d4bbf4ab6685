"""Training objectives, one file per paper's algorithm.

An objective is a frozen dataclass of hyper-parameters. objective(models, params, frozen, batch, keys, step) returns
(losses, metrics), all per image; the training step averages them and differentiates with respect to `params`. Each
objective also has `losses`: the paper's formula alone, for given noise levels, noise and networks as plain functions.
"""

from cm_jax.diffusion.ode import EulerStep, HeunStep, ODEStep
from cm_jax.objectives.adaptive_weight import AdaptiveWeight
from cm_jax.objectives.base import (
    Batch,
    FrozenParams,
    Losses,
    Metrics,
    Models,
    Objective,
    PairObjective,
)
from cm_jax.objectives.consistency_distillation import ConsistencyDistillation
from cm_jax.objectives.consistency_training import ConsistencyTraining
from cm_jax.objectives.continuous_time import ContinuousDistillation, ContinuousTraining
from cm_jax.objectives.denoising import Denoising
from cm_jax.objectives.distances import AnyDistance, Resized
from cm_jax.objectives.easy_consistency_tuning import EasyConsistencyTuning
from cm_jax.objectives.improved_consistency_training import ImprovedConsistencyTraining
from cm_jax.objectives.mean_flow import MeanFlow
from cm_jax.objectives.progressive_distillation import ProgressiveDistillation

AnyObjective = (
    Denoising
    | ConsistencyDistillation
    | ConsistencyTraining
    | ImprovedConsistencyTraining
    | EasyConsistencyTuning
    | ContinuousTraining
    | ContinuousDistillation
    | MeanFlow
    | ProgressiveDistillation
    | Objective
)
"""`Objective` admits those of other packages; files hold registered ones."""
