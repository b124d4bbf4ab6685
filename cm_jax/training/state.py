"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cm_jax.types import Params

Counter = Int[Array, ""]


class TrainState(NamedTuple):
    """Everything that a step changes. All arrays; whatever is not needed is None."""

    batches: Counter
    """Batches seen: the position in the data, and what random numbers are drawn from."""
    skipped: Counter
    """Those of them whose gradients were not finite, and which changed nothing else."""
    skipped_in_a_row: Counter
    params: Params
    """Float32 masters of the student, whatever precision its products have."""
    optimizer: Any
    target: Params | None
    """Of the target f^-, where it has parameters of its own."""
    teacher: Params | None
    """Of a teacher that changes on the way (progressive distillation); a fixed one is no part of the state."""
    averages: dict[str, Params]

    @property
    def step(self) -> Counter:
        """k: steps that were taken."""
        return self.batches - self.skipped


class Constants(NamedTuple):
    """Arrays that every step reads and none changes; on the devices once."""

    teacher: Params | None = None
    perceptual: Params | None = None
    """Weights of a perceptual distance."""
    images: Array | None = None
    """A data set that is small enough to lie on the devices: uint8 [n, h, w, c]."""
    labels: Array | None = None


class RawBatch(NamedTuple):
    """Images as they lie in files, uint8 [b, h, w, c], and classes; or their numbers in a data set on the devices."""

    images: Array | np.ndarray | None = None
    labels: Array | np.ndarray | None = None
    numbers: Array | np.ndarray | None = None


def fresh_counter() -> Counter:
    return jnp.zeros((), jnp.int32)
