"""Mean and covariance of features in double precision, a batch at a time."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from cm_jax.errors import InputError


class Gaussian(NamedTuple):
    """Mean and covariance of the features of a set."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean, and the sum of (x - mean)(x - mean)^T, which merge without cancellation (Chan et al. 1979)."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Moments":
        centered = features.astype(np.float64)
        mean = centered.mean(0)
        centered -= mean
        return cls(len(centered), mean, centered.T @ centered)

    def merged(self, other: "Moments") -> "Moments":
        """Moments of the union: S = S_a + S_b + (n_a n_b / n) (m_a - m_b)(m_a - m_b)^T."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(difference, difference * (self.count * other.count / count))
        return Moments(count, mean, scatter)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance S / (n - 1). Raises InputError for a single image."""
        if self.count < 2:
            raise InputError(f"A covariance needs at least 2 images, got {self.count}.")
        return Gaussian(self.mean, self.scatter / (self.count - 1))
