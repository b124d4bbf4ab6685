"""Metrics of image sets: closed forms, direct implementations, feature extraction, caching and level search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.errors import InputError
from cm_jax.evaluation import (
    EvalConfig,
    FeatureExtractor,
    Gaussian,
    ImageSet,
    Moments,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
    overlap,
    read_statistics,
    search_levels,
    squared_mmd,
    summarize,
    write_statistics,
)
from cm_jax.evaluation.features import reference_statistics
from cm_jax.feature_networks.inception_v3 import Features


def random_features(seed, count, size=24):
    """Correlated features of unequal variance, with means far from 0."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(0).normal(size=(size, size)) / size**0.5
    return (rng.normal(size=(count, size)) @ mix + 0.2 * seed + 3).astype(np.float32)


def gaussian(features):
    return Moments.of(features).gaussian()


def toy_features(params, images):
    flat = images.reshape(len(images), -1).astype(jnp.float32)
    pool = jnp.tanh(flat @ params["mix"] / 300)
    return Features(pool, pool[:, :64], pool[:, ::2], pool[:, :10] if "logits" in params else None)


def toy_extractor(*, logits=True):
    mix = np.random.default_rng(5).normal(size=(4 * 4 * 3, 16)).astype(np.float32)
    return FeatureExtractor(
        toy_features, {"mix": mix} | ({"logits": np.zeros(1, np.float32)} if logits else {}), "a toy", "no resizing"
    )


def image_set(seed, count, name="images", shift=0, size=4):
    """Random images as an ImageSet and as an array."""
    images = np.random.default_rng(seed).integers(shift, 200 + shift, (count, size, size, 3)).astype(np.uint8)
    return ImageSet(name, count, images.shape[1:], lambda: iter(np.array_split(images, max(1, count // 7)))), images


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


# ------------------------------------------------------------------------------------------------- feature extraction
def test_features_do_not_depend_on_batches_or_devices():
    extractor, (images, array) = toy_extractor(), image_set(0, 45)
    expected = np.asarray(jax.jit(toy_features)(extractor.params, array).pool)
    for batch_size, devices in ((None, ()), (3, jax.devices()[:1]), (16, jax.devices())):
        run = dataclasses.replace(extractor, batch_size=batch_size, devices=devices)
        seen = summarize(run, images.batches(), {"pool", "features"})
        assert seen.count == 45
        np.testing.assert_allclose(seen.features, expected, atol=1e-6)
        np.testing.assert_allclose(seen.pool.covariance, np.cov(expected, rowvar=False), atol=1e-6)


def test_gray_images_have_the_features_of_their_rgb_copies():
    _, array = image_set(0, 8)
    gray = array[..., :1]
    seen = [summarize(toy_extractor(), [x], {"features"}).features for x in (gray, np.repeat(gray, 3, 3))]
    np.testing.assert_array_equal(*seen)


def test_evaluate_identical_and_different_sets(tmp_path):
    (a, _), (b, _) = image_set(0, 60, "a"), image_set(1, 50, "b", shift=55)
    eval_config = EvalConfig(("fid", "sfid", "kid", "is", "prdc"), kid_subset_size=20)
    report, known = evaluate(toy_extractor(), a, a, eval_config)
    assert report.values["fid"] < 1e-6
    assert report.values["sfid"] < 1e-6
    assert report.values["precision"] == report.values["recall"] == 1
    other, _ = evaluate(dataclasses.replace(toy_extractor(), cache=tmp_path), b, a, eval_config)
    assert other.values["fid"] > 0.1
    assert other.values["kid"] > 0
    assert "N = 50 of b against 60 of a; 4 x 4 pixels" in other.line
    assert "NOT the published weights" in other.line
    assert other.protocol["kid_subset_size"] == 20
    path = tmp_path / "statistics.npz"
    write_statistics(path, known)
    from_file, _ = evaluate(toy_extractor(), b, read_statistics(path), EvalConfig(("fid", "sfid")))
    assert f"N = 50 of b against {path}; " in from_file.line
    assert from_file.values["fid"] == pytest.approx(other.values["fid"], rel=1e-9)
    assert from_file.values["sfid"] == pytest.approx(other.values["sfid"], rel=1e-9)


def test_reference_statistics_are_cached_by_content(tmp_path):
    (a, images), passes = image_set(0, 30), []

    def watch(batches, count):
        passes.append(count)
        return batches

    extractor = dataclasses.replace(toy_extractor(), cache=tmp_path, watch=watch)
    first = reference_statistics(extractor, a, ("pool",))
    again = reference_statistics(extractor, a, ("pool",))
    assert passes == [30]
    np.testing.assert_array_equal(first.pool.covariance, again.pool.covariance)
    reference_statistics(extractor, a, ("pool", "features"))  # only the features are missing
    assert len(passes) == 2
    other = np.array(images)
    other[3, 0, 0, 0] ^= 1
    reference_statistics(extractor, dataclasses.replace(a, batches=lambda: iter([other])), ("pool",))
    changed = {"mix": extractor.params["mix"] + 1}
    reference_statistics(dataclasses.replace(extractor, params=changed), a, ("pool",))
    assert len(passes) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damaged entries are computed again
    again = reference_statistics(extractor, a, ("pool",))
    assert len(passes) == 5
    np.testing.assert_array_equal(first.pool.covariance, again.pool.covariance)


@pytest.mark.parametrize(
    ("metrics", "count", "message"),
    [
        ("fid", 1, "fid needs at least 2 images; b has 1"),
        ("kid", 1, "kid needs at least 2 images"),
        ("pr", 3, "pr needs at least 4 images"),
        ("prdc", 5, "prdc needs at least 6 images"),
        ("is", 9, "is needs at least 10 images"),
    ],
)
def test_too_few_images_are_refused_and_the_minimum_is_accepted(metrics, count, message):
    (a, _), (b, _) = image_set(0, 60, "a"), image_set(1, count, "b")
    with pytest.raises(InputError, match=message):
        evaluate(toy_extractor(), b, a, EvalConfig((metrics,)))
    (enough, _) = image_set(1, count + 1, "b")
    evaluate(toy_extractor(), enough, a, EvalConfig((metrics,)))


def test_invalid_metrics_and_references_are_refused(tmp_path):
    (a, array), (large, _) = image_set(0, 20, "a"), image_set(0, 20, "large", size=8)
    with pytest.raises(InputError, match="large has images of 8 x 8 pixels, a of 4 x 4"):
        evaluate(toy_extractor(), large, a)
    with pytest.raises(InputError, match="no classifier"):
        evaluate(toy_extractor(logits=False), a, a, EvalConfig(("is",)))
    with pytest.raises(InputError, match=r"Unknown metric 'fidd'.*Did you mean 'fid'"):
        EvalConfig(("fidd",))
    with pytest.raises(InputError, match="choose one of them"):
        evaluate(toy_extractor(), a, a, EvalConfig(("pr", "prdc")))
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(16), sigma=np.eye(16))
    with pytest.raises(InputError, match="kid needs images of the reference"):
        evaluate(toy_extractor(), a, read_statistics(path), EvalConfig(("fid", "kid")))
    with pytest.raises(InputError, match="got 16 and 2048 features"):
        frechet_distance(gaussian(random_features(0, 5, 16)), gaussian(random_features(0, 5, 2048)))
    np.savez(path, mu=np.zeros(16))
    with pytest.raises(InputError, match="has no sigma; it has mu"):
        read_statistics(path)
    np.savez(path, mu=np.zeros(16), sigma=np.eye(15))
    with pytest.raises(InputError, match=r"sigma float64 \[15, 15\]"):
        read_statistics(path)
    np.savez(path, mu=np.full(16, np.nan), sigma=np.eye(16))
    with pytest.raises(InputError, match="NaN"):
        read_statistics(path)
    np.savez(path, arr_0=array)
    assert read_statistics(path) is None
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"not a complete \.npz file"):
        read_statistics(path)


# ------------------------------------------------------------------------------------------------------- level search
def test_level_search_finds_every_minimum_and_probes_no_timesteps_twice():
    """OpenAI's search reuses outdated probes in its last round and misses minima at the ends."""
    for levels in range(3, 42):
        for best in range(1, levels - 1):
            calls = []

            def score(timesteps, best=best, calls=calls):
                calls.append(timesteps)
                return abs(timesteps[0] - best) ** 1.5

            found = search_levels(score, levels, 2)
            assert found.timesteps == (best, 0)
            assert found.score == 0
            assert len(calls) == len(set(calls)) == len(found.probes) <= 18


def test_level_search_adds_one_timestep_at_a_time():
    expected = (31, 25, 9, 0)

    def score(timesteps):
        return sum(abs(each - best) for each, best in zip(timesteps[::-1], expected[::-1], strict=False))

    assert search_levels(score, 40, 4).timesteps == expected
    assert search_levels(lambda timesteps: -timesteps[0], 5, 4).timesteps == (3, 2, 1, 0)  # every index is used
    with pytest.raises(InputError, match="from 2 to 4, got 5"):
        search_levels(score, 5, 5)
