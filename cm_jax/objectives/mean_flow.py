"""MeanFlow: the velocity averaged over an interval [r, t] of the straight path from data to noise (MeanFlow)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.arrays import Images, Keys, Params, normal_per_image, per_image
from cm_jax.consistency_function import ConsistencyFunction
from cm_jax.curricula import Step
from cm_jax.errors import InputError
from cm_jax.noise_laws import IntervalLaw, SortedInterval
from cm_jax.objectives.base import (
    Batch,
    Functions,
    Helpers,
    Losses,
    Metrics,
    Objective,
    demand_forward_derivatives,
    draws,
)
from cm_jax.preconditioning import FlowScaling

Times = Float[Array, " b"]
Velocity = Callable[[Images, Times, Times], Images]
"""u: (z, t, t - r) -> the mean velocity from r to t."""


@dataclasses.dataclass(frozen=True)
class MeanFlow(Objective):
    """||u - stop(v - (t - r) du/dt)||^2 / stop(||.||^2 + epsilon)^power on z = (1 - t) x + t e, v = e - x.

    (MeanFlow, algorithm 1.) du/dt is taken along the path, by one forward derivative. Where r = t it is flow
    matching. One step of the model is e - u(e, 1, 1); with FlowScaling the network is a consistency function.
    """

    law: IntervalLaw = SortedInterval()
    power: float = 1.0
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if not (self.power >= 0 and self.epsilon > 0):
            raise InputError(
                f"MeanFlow's weight needs power >= 0 and epsilon > 0; got {self.power} and {self.epsilon}."
            )

    def check(self, functions: Functions) -> None:
        super().check(functions)
        flow_scaling(functions.student)
        demand_forward_derivatives(self, functions.student)
        if not getattr(functions.student.network, "interval_clock", False):
            raise InputError("MeanFlow's network must be told the interval's length: set its interval_clock=True.")

    def evaluate(
        self, functions: Functions, params: Params, helpers: Helpers, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        del helpers, step
        key_level, key_noise, key_dropout = draws(keys)
        t, r = self.law(key_level)
        noise = normal_per_image(key_noise, batch.images.shape[1:])

        network, clock = functions.student.network, flow_scaling(functions.student).time_factor

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


def flow_scaling(function: ConsistencyFunction) -> FlowScaling:
    """The scaling of MeanFlow's network. Raises InputError where it is another one."""
    if not isinstance(function.scaling, FlowScaling):
        raise InputError(f"MeanFlow's network needs FlowScaling, and got {type(function.scaling).__name__}.")
    return function.scaling
