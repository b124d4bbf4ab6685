"""Objectives: what training minimises, one file per paper's algorithm.

An objective is a frozen dataclass, of hyper-parameters, called as objective(functions, params, helpers, batch, keys,
step) -> (losses, metrics), all per image: the training step averages, and differentiates by `params`. Each also has
`losses`, the paper's algorithm alone, with the levels and the noise given, and the networks as plain functions.
"""

from cm_jax.diffusion.ode import EulerStep, HeunStep, ODEStep
from cm_jax.objectives.adaptive_weight import AdaptiveWeight
from cm_jax.objectives.base import Batch, FrozenParams, Losses, Metrics, Models, Objective
from cm_jax.objectives.consistency_distillation import ConsistencyDistillation
from cm_jax.objectives.consistency_training import ConsistencyTraining
from cm_jax.objectives.continuous_time import ContinuousDistillation, ContinuousTraining
from cm_jax.objectives.denoising import Denoising
from cm_jax.objectives.easy_consistency_tuning import EasyConsistencyTuning
from cm_jax.objectives.improved_consistency_training import ImprovedConsistencyTraining
from cm_jax.objectives.mean_flow import MeanFlow
from cm_jax.objectives.progressive_distillation import ProgressiveDistillation

__all__ = [
    "AdaptiveWeight",
    "Batch",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContinuousDistillation",
    "ContinuousTraining",
    "Denoising",
    "EasyConsistencyTuning",
    "EulerStep",
    "FrozenParams",
    "HeunStep",
    "ImprovedConsistencyTraining",
    "Losses",
    "MeanFlow",
    "Metrics",
    "Models",
    "ODEStep",
    "Objective",
    "ProgressiveDistillation",
]
