"""A tiny network, every objective with functions that it can train, and a batch, for the tests of objectives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Constant, Halving
from cm_jax.diffusion.noise_distributions import CappedInterval
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    MeanFlowPreconditioning,
    TrigFlowPreconditioning,
)
from cm_jax.networks.layers import class_embedding
from cm_jax.objectives import (
    AdaptiveWeight,
    Batch,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    Denoising,
    EasyConsistencyTuning,
    EulerStep,
    FrozenParams,
    ImprovedConsistencyTraining,
    MeanFlow,
    Models,
    ProgressiveDistillation,
)

SCHEDULE = KarrasSchedule()
SHAPE = (6, 4, 4, 3)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A smooth network of two layers with classes and dropout."""

    dropout: float = 0.0
    image_shape: tuple[int, int, int] = SHAPE[1:]
    classes: int | None = 5
    interval_embedding: bool = False
    guidance_embedding: bool = False
    attention: str = "plain"
    precision: str = "float32"

    def predict(self, params, x, c_noise, labels=None, dropout_keys=None, length=None):
        assert set(params) == set(self.shapes())
        if length is not None:
            c_noise = 300 * c_noise + 200 * length
        clock = jnp.stack([jnp.sin(c_noise / 300), jnp.cos(c_noise / 300), c_noise / 1000], axis=-1)
        hidden = jnp.tanh(
            x @ params["mix"] + (clock @ params["clock"] + class_embedding(params["table"], labels))[:, None, None]
        )
        if dropout_keys is not None and self.dropout:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, hidden.shape[1:]))(dropout_keys)
            hidden = jnp.where(kept, hidden / (1 - self.dropout), 0)
        return hidden @ params["out"]

    def shapes(self):
        return {"mix": (3, 8), "clock": (3, 8), "table": (5, 8), "out": (8, 3)}

    def initialize(self, key):
        keys = jax.random.split(key, 4)
        return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, self.shapes().items(), strict=True)}

    def check_input(self, shape, labeled): ...

    def prepare(self, params):
        return params

    def constrain(self, params):
        return params

    def at_precision(self, precision):
        return self


EDM = ConsistencyFunction(Tiny(), EDMPreconditioning())
BOUNDARY = ConsistencyFunction(Tiny(), ConsistencyPreconditioning())
TRIGFLOW = ConsistencyFunction(Tiny(), TrigFlowPreconditioning(time_factor=300.0))
FLOW = ConsistencyFunction(Tiny(interval_embedding=True), MeanFlowPreconditioning())
OBJECTIVES = {
    "denoising": Denoising(),
    "cd": ConsistencyDistillation(),
    "cd, euler": ConsistencyDistillation(solver=EulerStep(), curriculum=Constant(18)),
    "ct": ConsistencyTraining(),
    "ict": ImprovedConsistencyTraining(),
    "ect": EasyConsistencyTuning(),
    "progressive": ProgressiveDistillation(Halving(64, 100)),
    "sct": ContinuousTraining(),
    "scd": ContinuousDistillation(adaptive=AdaptiveWeight(16)),
    "meanflow": MeanFlow(),
    "meanflow, capped": MeanFlow(CappedInterval(), power=0.75, epsilon=1e-3),
}
FUNCTIONS = {
    "denoising": Models(EDM),
    "cd": Models(BOUNDARY, EDM),
    "cd, euler": Models(BOUNDARY, EDM),
    "ct": Models(BOUNDARY),
    "ict": Models(BOUNDARY),
    "ect": Models(EDM),
    "progressive": Models(EDM, EDM),
    "sct": Models(TRIGFLOW),
    "scd": Models(EDM, EDM),
    "meanflow": Models(FLOW),
    "meanflow, capped": Models(FLOW),
}
PARAMS, OTHER = (Tiny().initialize(jax.random.key(seed)) for seed in (1, 2))
HELPERS = FrozenParams(target=OTHER, teacher=Tiny().initialize(jax.random.key(3)))
KEYS = jax.random.split(jax.random.key(4), SHAPE[0])
BATCH = Batch(jax.random.uniform(jax.random.key(5), SHAPE, minval=-1), jnp.arange(SHAPE[0]) % 5)
NOISE = jax.random.normal(jax.random.key(6), SHAPE)
LATE = 150_000
"""A step at which ECT's pairs are apart from r = 0."""


def everything(objective, params: Any = PARAMS):
    """The parameters that an objective trains, each random."""
    extras = objective.extras()
    return params | jax.tree.map(lambda leaf: leaf + 0.1, extras)
