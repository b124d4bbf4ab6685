"""MeanFlow: the velocity averaged over an interval [r, t] of the straight path from data to noise (MeanFlow)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_distributions import AnyIntervalDistribution, SortedInterval
from cm_jax.diffusion.preconditioning import MeanFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives.base import Inputs, Losses, Metrics, Models, Objective, require_forward_derivatives
from cm_jax.types import Images, per_image

Times = Float[Array, " b"]
Velocity = Callable[[Images, Times, Times], Images]
"""u: (z, t, t - r) -> the mean velocity from r to t."""


@dataclasses.dataclass(frozen=True)
class MeanFlow(Objective):
    """||u - stop(u_target)||^2 / stop(||.||^2 + epsilon)^power, u_target = v - (t - r) du/dt (MeanFlow, algorithm 1).

    z = (1 - t) x + t e and v = e - x for noise e; one forward-mode derivative along the path gives du/dt. At r = t the
    loss is that of flow matching. Sampling in one step is e - u(e, 1, 1).
    """

    noise_distribution: AnyIntervalDistribution = SortedInterval()
    """Distribution of the intervals [r, t]."""
    power: float = 1.0
    """Exponent of the weight 1 / (squared error + epsilon)^power; 0: no weight."""
    epsilon: float = 0.01
    """Term added to the squared error in the weight."""

    def __post_init__(self) -> None:
        if not (self.power >= 0 and self.epsilon > 0):
            raise InputError(f"Expected power >= 0 and epsilon > 0, got {self.power} and {self.epsilon}.")

    def check(self, models: Models) -> None:
        super().check(models)
        mean_flow_preconditioning(models.student)
        require_forward_derivatives(self, models.student)
        if not models.student.network.interval_embedding:
            raise InputError("MeanFlow needs a network with an interval embedding: set its interval_embedding=True.")

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        t, r = self.noise_distribution(inputs.level_keys)
        student = inputs.models.student
        network, factor = student.network, mean_flow_preconditioning(student).time_factor

        def u(z: Images, t: Times, length: Times) -> Images:
            labels, dropout_keys = inputs.batch.labels, inputs.dropout_keys
            given = {} if (own := inputs.batch.augmentation) is None else {"augmentation": own}
            return network.predict(inputs.params, z, factor * t, labels, dropout_keys, factor * length, **given)

        errors = self.errors(u, inputs.batch.images, t, r, inputs.noise)
        return self.weighted(errors), {"sigma": t / (1 - t), "length": t - r, "error": errors}

    def losses(self, u: Velocity, images: Images, t: Times, r: Times, noise: Images) -> Losses:
        return self.weighted(self.errors(u, images, t, r, noise))

    def errors(self, u: Velocity, images: Images, t: Times, r: Times, noise: Images) -> Losses:
        """Unweighted squared errors, summed over each image. They show progress, while the losses are nearly flat."""
        z = per_image(1 - t) * images + per_image(t) * noise
        v = noise - images
        u_z, du_dt = jax.jvp(u, (z, t, t - r), (v, jnp.ones_like(t), jnp.ones_like(t)))
        u_target = jax.lax.stop_gradient(v - per_image(t - r) * du_dt)
        return jnp.square(u_z - u_target).sum((1, 2, 3))

    def weighted(self, errors: Losses) -> Losses:
        return errors / jax.lax.stop_gradient(errors + self.epsilon) ** self.power


def mean_flow_preconditioning(function: ConsistencyFunction) -> MeanFlowPreconditioning:
    """The preconditioning of a MeanFlow network. Raises InputError for any other."""
    if not isinstance(function.preconditioning, MeanFlowPreconditioning):
        raise InputError(f"MeanFlow needs MeanFlowPreconditioning, got {type(function.preconditioning).__name__}.")
    return function.preconditioning
