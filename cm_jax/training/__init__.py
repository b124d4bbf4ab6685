"""Training: a pure step, on one device or many, and runs that survive interruption."""

from cm_jax.training.config import PeriodicEvaluation, TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.setup import TrainingSetup, prepare
