"""Metrics of sets of features, in double precision on the host, and reports of their values."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from cm_jax.errors import InputError, check_int

_BLOCK = 2**24
"""Number of distances in memory at once."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Metric values with the protocol that makes them comparable."""

    values: Mapping[str, float]
    protocol: Mapping[str, Any]
    line: str
    """Values and protocol in one line of text."""


def to_json(reports: Sequence[Report]) -> str:
    """All values and protocols as one JSON object."""
    values = {name: value for report in reports for name, value in report.values.items()}
    protocol = {name: value for report in reports for name, value in report.protocol.items()}
    return json.dumps({"values": values, "protocol": protocol}, indent=2, ensure_ascii=False) + "\n"


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


class Estimate(NamedTuple):
    """A mean over subsets or splits, and their standard deviation."""

    mean: float
    std: float


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)      (Heusel et al. 2017).

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): real and stable for singular covariances too,
    unlike the square root of the product.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"Expected features of one network, got {a.mean.size} and {b.mean.size} features.")
    overlap = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    difference = a.mean - b.mean
    return max(0.0, float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root; eigenvalues at rounding level count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    values[values < len(values) * np.finfo(np.float64).eps * max(values[-1], 0)] = 0
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Unbiased squared MMD with the kernel k(x, y) = (x . y / d + 1)^3 (Binkowski et al. 2018).

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over pairs of different images.
    """
    if min(len(x), len(y)) < 2:
        raise InputError(f"KID needs at least 2 images per set, got {len(x)} and {len(y)}.")
    x, y = x.astype(np.float64), y.astype(np.float64)

    def within(z: np.ndarray) -> float:
        kernel = (z @ z.T / z.shape[1] + 1) ** 3
        return (kernel.sum() - np.trace(kernel)) / (len(z) * (len(z) - 1))

    return float(within(x) + within(y) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean())


def kernel_distance(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Estimate:
    """KID: mean of `squared_mmd` over random subsets of `size` images (of all images of a smaller set)."""
    check_int("The number of subsets", subsets, 1, 10**6)
    size = min(check_int("The size of a subset", size, 2, 10**6), len(x), len(y))
    rng = np.random.default_rng(seed)
    subset_pairs = ((z[rng.choice(len(z), size, replace=False)] for z in (x, y)) for _ in range(subsets))
    found = [squared_mmd(*pair) for pair in subset_pairs]
    return Estimate(float(np.mean(found)), float(np.std(found)))


def inception_score(logits: Float[np.ndarray, "n c"], *, splits: int = 10) -> Estimate:
    """exp(mean over images of KL(p(class | image), p(class))), mean over splits (Salimans et al. 2016)."""
    if len(logits) < splits:
        raise InputError(f"The Inception score with {splits} splits needs at least {splits} images, got {len(logits)}.")
    found = []
    for part in np.array_split(logits.astype(np.float64), splits):
        logs = part - part.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        probabilities = np.exp(logs)
        overall = np.maximum(probabilities.mean(0), np.finfo(np.float64).tiny)
        found.append(np.exp((probabilities * (logs - np.log(overall))).sum(1).mean()))
    return Estimate(float(np.mean(found)), float(np.std(found)))


class Overlap(NamedTuple):
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    All lie in [0, 1] except density, which may exceed 1.
    """

    precision: float
    """Fraction of samples inside a ball of a real image."""
    recall: float
    """Fraction of real images inside a ball of a sample."""
    density: float
    """Mean number of real balls that contain a sample, divided by k."""
    coverage: float
    """Fraction of real balls that contain a sample."""


def overlap(real: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], neighbors: int) -> Overlap:
    """Overlap of two sets of features, from balls that reach from each image to the k-th nearest of its own set.

    k: `neighbors`. Raises InputError for sets of fewer than k + 1 images.
    """
    if min(len(real), len(samples)) <= neighbors:
        raise InputError(
            f"Precision and recall with {neighbors} neighbors need at least {neighbors + 1} images per set, got "
            f"{len(real)} in the reference and {len(samples)} samples."
        )
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    real_radii, sample_radii = _radii(real, neighbors), _radii(samples, neighbors)
    precise = balls = 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in squared_distances(samples, real):
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
    for rows, distances in squared_distances(features, features):
        distances[np.arange(len(distances)), np.arange(len(features))[rows]] = np.inf
        radii[rows] = np.partition(distances, neighbors - 1)[:, neighbors - 1]
    return radii


def squared_distances(
    x: Float64[np.ndarray, "m d"], y: Float64[np.ndarray, "n d"]
) -> Iterator[tuple[slice, Float64[np.ndarray, "b n"]]]:
    """(rows of x, their distances |x|^2 + |y|^2 - 2 x . y to all of y), block by block."""
    step = max(1, _BLOCK // len(y))
    for rows in (slice(start, start + step) for start in range(0, len(x), step)):
        yield rows, np.maximum((x[rows] ** 2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x[rows] @ y.T), 0)
