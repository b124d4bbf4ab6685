"""Evaluation of image sets: feature extraction, reports, caching, invalid input and level search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.errors import InputError
from cm_jax.evaluation import (
    EvalConfig,
    FeatureExtractor,
    ImageSet,
    evaluate,
    features,
    frechet_distance,
    read_statistics,
    search_levels,
    summarize,
    write_statistics,
)
from cm_jax.feature_networks.inception_v3 import Features
from cm_jax.parallelism import DataMesh, OneDevice
from tests.laws.test_metrics import gaussian, random_features
from tests.support import announced


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

    def read(first, last):
        return iter(np.array_split(images[first:last], max(1, count // 7)))

    return ImageSet(name, count, images.shape[1:], read), images


# ------------------------------------------------------------------------------------------------- feature extraction
def test_features_do_not_depend_on_batches_or_devices():
    extractor, (images, array) = toy_extractor(), image_set(0, 45)
    expected = np.asarray(jax.jit(toy_features)(extractor.params, array).pool)
    for batch_size, parallelism in ((None, None), (3, OneDevice()), (16, DataMesh(local=True))):
        run = dataclasses.replace(extractor, batch_size=batch_size, parallelism=parallelism)
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

    def reference_statistics(*arguments):
        with announced() as activities:
            found = features.reference_statistics(*arguments)
        passes.extend(each for each in activities if each.startswith("Computing features"))
        return found

    extractor = dataclasses.replace(toy_extractor(), cache=tmp_path)
    first = reference_statistics(extractor, a, ("pool",))
    again = reference_statistics(extractor, a, ("pool",))
    assert passes == ["Computing features of images: 0 of 30 images"]
    np.testing.assert_array_equal(first.pool.covariance, again.pool.covariance)
    reference_statistics(extractor, a, ("pool", "features"))  # only the features are missing
    assert len(passes) == 2
    other = np.array(images)
    other[3, 0, 0, 0] ^= 1
    reference_statistics(extractor, dataclasses.replace(a, read=lambda first, last: iter([other])), ("pool",))
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
