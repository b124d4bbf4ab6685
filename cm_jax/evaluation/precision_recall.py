"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

Both estimate how two sets overlap from balls around the features of each image. The radius of a ball is the distance to
the k-th nearest neighbor in its own set. Distances are computed block by block in float64.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from cm_jax.errors import InputError

_BLOCK = 2**24
"""Number of distances in memory at once."""


class Overlap(NamedTuple):
    """Precision, recall and coverage lie in [0, 1]; density may exceed 1."""

    precision: float
    """Fraction of samples inside a ball of a real image."""
    recall: float
    """Fraction of real images inside a ball of a sample."""
    density: float
    """Mean number of real balls that contain a sample, divided by k."""
    coverage: float
    """Fraction of real balls that contain a sample."""


def overlap(real: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], neighbors: int) -> Overlap:
    """Overlap of two sets of features, with k = `neighbors`. Raises InputError for sets of fewer than k + 1 images."""
    for name, features in (("reference", real), ("samples", samples)):
        if len(features) <= neighbors:
            raise InputError(
                f"Precision and recall with {neighbors} neighbors need at least {neighbors + 1} images; "
                f"the {name} have {len(features)}."
            )
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    real_radii, sample_radii = _radii(real, neighbors), _radii(samples, neighbors)
    precise = balls = 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows in _blocks(len(samples), len(real)):
        distances = _squared_distances(samples[rows], real)
        inside: Bool[np.ndarray, "b n"] = distances <= real_radii
        precise += int(inside.any(1).sum())
        balls += int(inside.sum())
        covered |= inside.any(0)
        recalled |= (distances <= sample_radii[rows, None]).any(0)
    count = len(samples)
    return Overlap(precise / count, float(recalled.mean()), balls / (neighbors * count), float(covered.mean()))


def _radii(features: Float64[np.ndarray, "n d"], neighbors: int) -> Float64[np.ndarray, " n"]:
    """Squared distance of each image to its k-th nearest other image."""
    radii = np.empty(len(features))
    for rows in _blocks(len(features), len(features)):
        distances = _squared_distances(features[rows], features)
        distances[np.arange(len(distances)), np.arange(len(features))[rows]] = np.inf
        radii[rows] = np.partition(distances, neighbors - 1)[:, neighbors - 1]
    return radii


def _squared_distances(x: Float64[np.ndarray, "b d"], y: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "b n"]:
    """|x|^2 + |y|^2 - 2 x . y."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T), 0)


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, _BLOCK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]
