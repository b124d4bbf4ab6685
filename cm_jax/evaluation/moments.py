"""Mean and covariance of features in double precision, a batch at a time."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from cm_jax.errors import InputError


class Gaussian(NamedTuple):
    """What Frechet distances know of a set."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean, and the sum of (x - mean)(x - mean)^T: what merges without losing digits (Chan et al. 1979)."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Moments":
        wide = features.astype(np.float64)
        mean = wide.mean(0)
        wide -= mean
        return cls(len(wide), mean, wide.T @ wide)

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets together: S = S_a + S_b + (n_a n_b / n) (m_a - m_b)(m_a - m_b)^T."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(apart, apart * (self.count * other.count / count))
        return Moments(count, mean, scatter)

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance, S / (n - 1). Raises InputError for a single image."""
        if self.count < 2:
            raise InputError(f"A covariance needs 2 images at least, got {self.count}.")
        return Gaussian(self.mean, self.scatter / (self.count - 1))
