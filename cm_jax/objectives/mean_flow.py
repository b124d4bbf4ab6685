"""MeanFlow: the velocity averaged over an interval [r, t] of the straight path from data to noise (MeanFlow)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Step
from cm_jax.diffusion.noise_distributions import IntervalDistribution, SortedInterval
from cm_jax.diffusion.preconditioning import MeanFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives.base import (
    Batch,
    FrozenParams,
    Losses,
    Metrics,
    Models,
    Objective,
    demand_forward_derivatives,
    split_keys,
)
from cm_jax.types import Images, Keys, Params, normal_per_image, per_image

Times = Float[Array, " b"]
Velocity = Callable[[Images, Times, Times], Images]
"""u: (z, t, t - r) -> the mean velocity from r to t."""


@dataclasses.dataclass(frozen=True)
class MeanFlow(Objective):
    """||u - stop(v - (t - r) du/dt)||^2 / stop(||.||^2 + epsilon)^power on z = (1 - t) x + t e, v = e - x.

    (MeanFlow, algorithm 1.) du/dt is taken along the path, by one forward derivative. Where r = t it is flow
    matching. One step of the model is e - u(e, 1, 1).
    """

    noise_distribution: IntervalDistribution = SortedInterval()
    power: float = 1.0
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if not (self.power >= 0 and self.epsilon > 0):
            raise InputError(
                f"MeanFlow's weight needs power >= 0 and epsilon > 0; got {self.power} and {self.epsilon}."
            )

    def check(self, models: Models) -> None:
        super().check(models)
        mean_flow_preconditioning(models.student)
        demand_forward_derivatives(self, models.student)
        if not getattr(models.student.network, "interval_embedding", False):
            raise InputError("MeanFlow's network must be told the interval's length: set its interval_embedding=True.")

    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        del frozen, step
        key_level, key_noise, key_dropout = split_keys(keys)
        t, r = self.noise_distribution(key_level)
        noise = normal_per_image(key_noise, batch.images.shape[1:])

        network, clock = models.student.network, mean_flow_preconditioning(models.student).time_factor

        def u(z: Images, t: Times, length: Times) -> Images:
            return network.predict(params, z, clock * t, batch.labels, key_dropout, clock * length)

        errors = self.errors(u, batch.images, t, r, noise)
        return self.weighted(errors), {"sigma": t / (1 - t), "length": t - r, "error": errors}

    def losses(self, u: Velocity, images: Images, t: Times, r: Times, noise: Images) -> Losses:
        return self.weighted(self.errors(u, images, t, r, noise))

    def errors(self, u: Velocity, images: Images, t: Times, r: Times, noise: Images) -> Losses:
        """The squared error itself, summed over an image. Its decrease shows progress; the weighted loss is flat."""
        z = per_image(1 - t) * images + per_image(t) * noise
        v = noise - images
        prediction, derivative = jax.jvp(u, (z, t, t - r), (v, jnp.ones_like(t), jnp.ones_like(t)))
        goal = jax.lax.stop_gradient(v - per_image(t - r) * derivative)
        return jnp.square(prediction - goal).sum((1, 2, 3))

    def weighted(self, errors: Losses) -> Losses:
        return errors / jax.lax.stop_gradient(errors + self.epsilon) ** self.power


def mean_flow_preconditioning(function: ConsistencyFunction) -> MeanFlowPreconditioning:
    """The scaling of MeanFlow's network. Raises InputError where it is another one."""
    if not isinstance(function.preconditioning, MeanFlowPreconditioning):
        raise InputError(
            f"MeanFlow's network needs MeanFlowPreconditioning, and got {type(function.preconditioning).__name__}."
        )
    return function.preconditioning
