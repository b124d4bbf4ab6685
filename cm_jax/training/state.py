"""Training state, constants and batches of a step."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cm_jax.types import Params

Counter = Int[Array, ""]


class TrainState(NamedTuple):
    """Everything that a step changes: a tree of arrays. Components that a method does not use are None."""

    batches: Counter
    """Batches seen: the position in the data and in the stream of random numbers."""
    skipped: Counter
    """Batches that were skipped because their gradients were not finite."""
    consecutive_skips: Counter
    params: Params
    """Float32 parameters of the student, whatever its compute precision."""
    optimizer: Any
    target: Params | None
    """Target network f^-; None if it is the student."""
    teacher: Params | None
    """Teacher that changes during training (progressive distillation); a fixed one is in Constants."""
    ema: dict[str, Params]

    @property
    def step(self) -> Counter:
        """k: optimizer steps taken."""
        return self.batches - self.skipped


class Constants(NamedTuple):
    """Arrays that every step reads and none changes; copied to the devices once."""

    teacher: Params | None = None
    perceptual: Params | None = None
    """Weights of a perceptual distance (LPIPS)."""
    images: Array | None = None
    """Whole data set, if it is resident on the devices: uint8 [n, h, w, c]."""
    labels: Array | None = None


class StepBatch(NamedTuple):
    """uint8 images [b, h, w, c] and labels [b], or indices [b] into a data set that is resident on the devices."""

    images: Array | np.ndarray | None = None
    labels: Array | np.ndarray | None = None
    indices: Array | np.ndarray | None = None


def zero_counter() -> Counter:
    return jnp.zeros((), jnp.int32)
