"""Distances between sets of features, and the Inception score. All of it in double precision, on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cm_jax.errors import InputError, check_int
from cm_jax.evaluation.moments import Gaussian


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

    def subset(features: np.ndarray) -> np.ndarray:
        return features[rng.choice(len(features), size, replace=False)]

    found = [squared_mmd(subset(x), subset(y)) for _ in range(subsets)]
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
