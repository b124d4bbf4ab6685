"""Metrics of sets of features: closed forms and direct implementations."""

import numpy as np
import pytest

from cm_jax.evaluation import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    overlap,
    squared_mmd,
)


def random_features(seed, count, size=24):
    """Correlated features of unequal variance, with means far from 0."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(0).normal(size=(size, size)) / size**0.5
    return (rng.normal(size=(count, size)) @ mix + 0.2 * seed + 3).astype(np.float32)


def gaussian(features):
    return Moments.of(features).gaussian()


# ---------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("sizes", [(100, 1, 399), (250, 250), (2,) * 250])
def test_streamed_moments_equal_direct_moments(sizes):
    features = random_features(1, 500)
    features[:, 0] += 1e4  # with a large mean, sums of squares lose the variance
    parts = np.split(features, np.cumsum(sizes)[:-1])
    found = Moments.of(parts[0])
    for part in parts[1:]:
        found = found.merged(Moments.of(part))
    exact = features.astype(np.longdouble)
    np.testing.assert_allclose(found.mean, exact.mean(0).astype(float), rtol=1e-13)
    centered = exact - exact.mean(0)
    covariance = (centered.T @ centered / 499).astype(float)
    np.testing.assert_allclose(found.gaussian().covariance, covariance, rtol=1e-10, atol=1e-12)


def test_frechet_distance_of_gaussians_has_the_closed_form():
    """Commuting covariances U diag(a) U^T: |m|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    a, b, mean = rng.uniform(0, 5, 30), rng.uniform(0, 5, 30), rng.normal(size=30)
    a[:5] = 0  # singular, like the covariance of a few images
    found = frechet_distance(Gaussian(np.zeros(30), basis * a @ basis.T), Gaussian(mean, basis * b @ basis.T))
    assert found == pytest.approx(mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)


def test_frechet_distance_of_gaussian_samples_is_near_the_closed_form():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(100_000, 4)), 1 + 2 * rng.normal(size=(100_000, 4))
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(4 + 4, rel=0.02)


@pytest.mark.parametrize("count", [2, 10, 500])
def test_frechet_distance_of_a_set_to_itself_is_zero(count):
    features = random_features(2, count)
    assert frechet_distance(gaussian(features), gaussian(features)) < 1e-10 * np.trace(gaussian(features).covariance)


@pytest.mark.parametrize("counts", [(300, 400), (10, 15)])
def test_frechet_distance_equals_a_direct_implementation_and_is_symmetric(counts):
    """tr (A B)^(1/2) from the eigenvalues of A B."""
    x, y = (random_features(seed, count) for seed, count in zip((3, 4), counts, strict=True))
    a, b = np.cov(x, rowvar=False, dtype=np.float64), np.cov(y, rowvar=False, dtype=np.float64)
    difference = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    values = np.linalg.eigvals(a @ b).real
    expected = difference @ difference + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    found = frechet_distance(gaussian(x), gaussian(y))
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(gaussian(y), gaussian(x)) == pytest.approx(found, rel=1e-9)


# --------------------------------------------------------------------------------------------- KID, precision, recall
def test_squared_mmd_equals_its_definition():
    x, y = random_features(5, 7, 5).astype(np.float64), random_features(6, 9, 5).astype(np.float64)

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    among_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    among_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    assert squared_mmd(x, y) == pytest.approx(np.mean(among_x) + np.mean(among_y) - 2 * np.mean(between), rel=1e-9)


def test_kid_is_unbiased():
    """The mean over many small sets is 0 for equal distributions, and the value of large sets for different ones."""
    rng = np.random.default_rng(7)
    same = [squared_mmd(*rng.normal(size=(2, 10, 4))) for _ in range(4000)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 4000**0.5
    small = [squared_mmd(rng.normal(size=(10, 4)), 0.5 + rng.normal(size=(10, 4))) for _ in range(4000)]
    large = squared_mmd(rng.normal(size=(5000, 4)), 0.5 + rng.normal(size=(5000, 4)))
    assert abs(np.mean(small) - large) < 4 * np.std(small) / 4000**0.5 + 0.1 * large


def test_kid_of_subsets_depends_only_on_the_seed():
    x, y = random_features(8, 60), random_features(9, 50)
    first = kernel_distance(x, y, subsets=5, size=20, seed=3)
    assert first == kernel_distance(x, y, subsets=5, size=20, seed=3)
    assert first != kernel_distance(x, y, subsets=5, size=20, seed=4)
    assert first.std > 0
    # Unbiased: k(x, x) is left out within each set but not between the sets, so a set and itself give less than 0.
    assert kernel_distance(x, x, subsets=3, size=1000).mean < 0
    whole = kernel_distance(x, y[:50], subsets=2, size=50)
    assert whole.mean == pytest.approx(squared_mmd(x, y), rel=0.3)


@pytest.mark.parametrize("block", [2**24, 64])
def test_overlap_equals_a_direct_implementation(monkeypatch, block):
    monkeypatch.setattr("cm_jax.evaluation.metrics._BLOCK", block)
    real, generated = random_features(1, 70, 3), random_features(2, 50, 3)
    wide = [each.astype(np.float64) for each in (real, generated)]

    def radius(points, index):
        return sorted(np.linalg.norm(points[index] - other) for i, other in enumerate(points) if i != index)[2]

    radii = [[radius(points, i) for i in range(len(points))] for points in wide]
    distances = np.array([[np.linalg.norm(x - y) for x in wide[0]] for y in wide[1]])
    inside = distances <= np.array(radii[0])
    found = overlap(real, generated, 3)
    assert found.precision == pytest.approx(np.mean(inside.any(1)), abs=1e-6)
    assert found.recall == pytest.approx(np.mean((distances <= np.array(radii[1])[:, None]).any(0)), abs=1e-6)
    assert found.density == pytest.approx(inside.sum() / (3 * 50), abs=1e-6)
    assert found.coverage == pytest.approx(np.mean(distances.min(0) <= np.array(radii[0])), abs=1e-6)
    assert 0 < found.recall < 1
    assert 0 < found.precision < 1


def test_overlap_of_identical_distant_and_partly_covered_sets():
    features = random_features(1, 40)
    assert overlap(features, features, 3)[:2] == (1, 1)
    assert overlap(features, features + 1000, 3) == (0, 0, 0, 0)
    real = np.concatenate([features, features + 1000])
    assert overlap(real, features, 3)[:2] == (1, 0.5)  # half of the real features are covered


def test_inception_score_of_certain_and_of_uniform_predictions():
    certain = 200 * np.eye(10)[np.arange(100) % 10]
    assert inception_score(certain).mean == pytest.approx(10, rel=1e-6)
    assert inception_score(np.zeros((50, 7))) == pytest.approx((1, 0), abs=1e-9)
