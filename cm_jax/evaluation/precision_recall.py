"""Precision and recall, density and coverage: how two sets overlap, by balls around each image's features.

A ball reaches to the k-th nearest neighbour within its own set. Distances are taken block by block, in double
precision.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from cm_jax.errors import InputError

_BLOCK = 2**24
"""Distances that are held at once."""


class Overlap(NamedTuple):
    """Each a share, but density, which may exceed 1."""

    precision: float
    """Of the drawn images, those in a ball of a real one (Kynkaanniemi et al. 2019)."""
    recall: float
    """Of the real images, those in a ball of a drawn one."""
    density: float
    """Mean number of real balls that a drawn image lies in, over k (Naeem et al. 2020)."""
    coverage: float
    """Of the real balls, those with a drawn image in them."""


def overlap(real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], neighbours: int) -> Overlap:
    """Raises InputError where a set has too few images for `neighbours` of them."""
    for name, features in (("reference", real), ("samples", drawn)):
        if len(features) <= neighbours:
            raise InputError(
                f"Precision and recall by {neighbours} neighbours need {neighbours + 1} images at least; "
                f"the {name} have {len(features)}."
            )
    real, drawn = real.astype(np.float64), drawn.astype(np.float64)
    real_radii, drawn_radii = _radii(real, neighbours), _radii(drawn, neighbours)
    precise = balls = 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows in _blocks(len(drawn), len(real)):
        distances = _squared_distances(drawn[rows], real)
        inside: Bool[np.ndarray, "b n"] = distances <= real_radii
        precise += int(inside.any(1).sum())
        balls += int(inside.sum())
        covered |= inside.any(0)
        recalled |= (distances <= drawn_radii[rows, None]).any(0)
    return Overlap(
        precise / len(drawn), float(recalled.mean()), balls / (neighbours * len(drawn)), float(covered.mean())
    )


def _radii(features: Float64[np.ndarray, "n d"], neighbours: int) -> Float64[np.ndarray, " n"]:
    """Squared distance of each from its k-th nearest other."""
    radii = np.empty(len(features))
    for rows in _blocks(len(features), len(features)):
        distances = _squared_distances(features[rows], features)
        distances[np.arange(len(distances)), np.arange(len(features))[rows]] = np.inf
        radii[rows] = np.partition(distances, neighbours - 1)[:, neighbours - 1]
    return radii


def _squared_distances(x: Float64[np.ndarray, "b d"], y: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "b n"]:
    """|x|^2 + |y|^2 - 2 x . y."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T), 0)


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, _BLOCK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]
