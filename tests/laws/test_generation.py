"""One seed, the same images: whatever the batch, the order, and the number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.networks.layers import dropout
from cm_jax.parallelism import DataMesh, OneDevice, Pmap, Sharded
from cm_jax.samplers import Ancestral, Churn, Consistency, Heun, choose_levels
from cm_jax.samplers.generation import generate, sample_labels
from tests.support import SMALL, random_params

BOUND = 1e-5
CONSISTENCY = Consistency()
CONFIG = ModelConfig(
    SMALL, ConsistencyPreconditioning(), num_levels=18, class_names=tuple(f"kind {i}, sort {i}" for i in range(10))
)
MODEL = Model(CONFIG, SMALL.prepare(random_params(SMALL)))
TINY = dataclasses.replace(SMALL, image_size=8, channel_mult=(1,), attention_factors=())
STUDENT, TEACHER = (
    Model(ModelConfig(TINY, preconditioning, num_levels=18), TINY.prepare(random_params(TINY)))
    for preconditioning in (ConsistencyPreconditioning(), EDMPreconditioning())
)
LEVELS = (80.0, 3.0, 0.002)
ONE = OneDevice()


def images(count, batch_size, across=ONE, sampler=CONSISTENCY, labels=None, levels=LEVELS, model=STUDENT):
    key = jax.random.key(7)
    labels = sample_labels(key, count, 10) if labels is None else labels
    parts = generate(
        model.config.function,
        sampler,
        model.params,
        levels,
        key,
        count,
        labels,
        batch_size=batch_size,
        parallelism=across,
    )
    return list(parts)


@pytest.fixture(scope="module")
def reference():
    return np.concatenate(images(10, 10))


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


ACROSS = [(4, ONE), (1, ONE), (10, Pmap()), (4, Pmap(2)), (16, DataMesh()), (8, Sharded(shards=4))]


@pytest.mark.parametrize(("batch_size", "across"), ACROSS, ids=str)
def test_same_images_in_other_batches_and_on_other_devices(reference, batch_size, across):
    parts = images(10, batch_size, across)
    assert max(map(len, parts)) <= max(batch_size, 8)
    np.testing.assert_allclose(np.concatenate(parts), reference, atol=BOUND)


@pytest.mark.parametrize("sampler", [Ancestral(), Heun(churn=Churn(10))], ids=["ancestral", "heun"])
def test_a_teachers_samplers_on_eight_devices(sampler):
    levels = choose_levels(sampler, TEACHER.config.schedule, 18, steps=8)
    parts = (images(5, 5, across, sampler, levels=levels, model=TEACHER) for across in (ONE, Pmap()))
    alone, apart = map(np.concatenate, parts)
    np.testing.assert_allclose(apart, alone, atol=BOUND)


def test_a_program_in_double_precision_gets_the_same_images_in_single_precision(reference):
    noisy = Heun(churn=Churn(10))
    levels = choose_levels(noisy, TEACHER.config.schedule, 18, steps=2)
    of_teacher = images(2, 2, sampler=noisy, levels=levels, model=TEACHER)[0]
    weights, keys = TINY.initialize(jax.random.key(3)), jax.random.split(jax.random.key(1), 1)
    dropped = np.asarray(dropout(jnp.ones((1, 8, 8, 2)), 0.3, keys, 5)) == 0
    with jax.enable_x64(True):
        again = [images(3, 3)[0], images(2, 2, sampler=noisy, levels=levels, model=TEACHER)[0]]
        labels = STUDENT.sample_labels(7, 10)
        jax.tree.map(np.testing.assert_array_equal, TINY.initialize(jax.random.key(3)), weights)
        np.testing.assert_array_equal(np.asarray(dropout(jnp.ones((1, 8, 8, 2)), 0.3, keys, 5)) == 0, dropped)
    np.testing.assert_array_equal(labels, STUDENT.sample_labels(7, 10))
    for double, single in zip(again, (reference[:3], of_teacher), strict=True):
        assert double.dtype == np.float32
        np.testing.assert_allclose(double, single, atol=BOUND)


def test_more_images_continue_the_same_ones(reference):
    np.testing.assert_allclose(np.concatenate(images(3, 3)), reference[:3], atol=BOUND)


def test_images_differ_from_each_other_and_between_seeds(reference):
    assert len(np.unique(reference.reshape(10, -1), axis=0)) == 10
    assert not np.allclose(STUDENT.sample(8, 10, sigmas=LEVELS[:-1]), reference, atol=0.1)


def test_labels_come_from_the_same_key(reference):
    labels = STUDENT.sample_labels(7, 10)
    np.testing.assert_array_equal(labels, STUDENT.sample_labels(jax.random.key(7), 12)[:10])
    np.testing.assert_allclose(STUDENT.sample(7, 10, sigmas=LEVELS[:-1]), reference, atol=BOUND)
    np.testing.assert_allclose(STUDENT.sample(7, 10, labels=labels, sigmas=LEVELS[:-1]), reference, atol=BOUND)
    assert set(STUDENT.sample_labels(0, 400)) == set(range(10))


@pytest.mark.parametrize("which", [{"key": 3, "count": 2}, {"seeds": [3, 8]}], ids=str)
def test_labels_come_from_the_same_key_with_given_noise(which):
    noise = np.random.default_rng(0).standard_normal((1, 2, 8, 8, 3)).astype(np.float32)
    expected = STUDENT.sample(**which, labels=STUDENT.sample_labels(**which), noise=noise)
    np.testing.assert_array_equal(STUDENT.sample(**which, noise=noise), expected)
    with pytest.raises(InputError, match=r"Expected labels in \[0, 9\]"):
        STUDENT.sample(count=2, noise=noise)
    for ignored in ({"batch_size": -5}, {"progress": True}):
        with pytest.raises(InputError, match="one batch: leave batch_size and progress out"):
            STUDENT.sample(**which, noise=noise, **ignored)


def test_several_seeds_give_the_first_image_of_each():
    seeds = [3, 8, jax.random.key(2)]
    together = STUDENT.sample(seeds=seeds, batch_size=2, progress=True)
    np.testing.assert_allclose(together, np.concatenate([STUDENT.sample(seed) for seed in seeds]), atol=BOUND)
    labels = [STUDENT.sample_labels(seed, 1)[0] for seed in seeds]
    np.testing.assert_array_equal(STUDENT.sample_labels(seeds=seeds), labels)
    assert len(np.unique(labels)) > 1


def test_a_label_changes_its_own_image_alone():
    labels = np.zeros(4, np.int32)
    changed = labels.copy()
    changed[2] = 5
    before, after = (np.concatenate(images(4, 4, labels=given)) for given in (labels, changed))
    differs = np.abs(before - after).max((1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(differs, [False, False, True, False])


def test_labels_by_number_name_and_synonym():
    np.testing.assert_array_equal(MODEL.class_numbers("sort 3", 2), [3, 3])
    np.testing.assert_array_equal(MODEL.class_numbers(["Kind 1", "7"], 2), [1, 7])
    np.testing.assert_array_equal(MODEL.class_numbers(4, 3), [4, 4, 4])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (10, "from 0 to 9"),
        (-1, "from 0 to 9"),
        ("1.5", "no class"),
        ("kind 33", "no class"),
        ([1, 2], "Expected one label or 3, .*; got 2"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        MODEL.sample(0, 3, labels=labels)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"count": 0}, "count must be"),
        ({"seeds": [3, 8]}, r"sample\(seeds=\[3, 8\]\)"),
        ({"key": None}, "Give either a key"),
        ({"key": None, "count": 2, "seeds": [3, 8]}, "Give either a key"),
        ({"key": None, "seeds": []}, "Expected a list of seeds"),
        ({"key": None, "seeds": [3, -1]}, "A seed must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"sampler": "magic"}, "got 'magic'"),
        ({"steps": 2, "noise": np.zeros((3, 2, 16, 16, 3), np.float32)}, r"\[3, 1, 16, 16, 3\]"),
        ({"steps": 2, "noise": np.zeros((1, 1, 16, 16, 3), np.float32)}, r"\[3, 1, 16, 16, 3\].*; got \[1, "),
    ],
)
def test_wrong_requests_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        MODEL.sample(**{"key": 0, "count": 1, **asked})


@pytest.mark.parametrize(
    ("images", "sigma", "labels", "message"),
    [
        (np.zeros((1, 15, 16, 3)), 1.0, 0, "multiples of"),
        (np.zeros((1, 16, 16, 4)), 1.0, 0, "batch, height, width, 3"),
        (np.zeros((2, 16, 16, 3)), [1.0, 1.0, 1.0], 0, "one sigma or 2"),
        (np.zeros((2, 16, 16, 3)), -1.0, 0, "not negative"),
        (np.zeros((2, 16, 16, 3)), 1.0, None, "give labels"),
        (np.zeros((2, 16, 16, 3)), 1.0, 11, "from 0 to 9"),
    ],
)
def test_wrong_denoising_is_refused(images, sigma, labels, message):
    with pytest.raises(InputError, match=message):
        MODEL.denoise(images, np.asarray(sigma), labels)


def test_denoise_is_the_consistency_function():
    x = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(MODEL.denoise(x, 0.002, "kind 1"), x)
    mixed = MODEL.denoise(x, np.array([80.0, 1.0, 0.002]), [0, 1, 2])
    for index, sigma in enumerate([80.0, 1.0, 0.002]):
        alone = MODEL.denoise(x[index : index + 1], sigma, index)
        np.testing.assert_allclose(mixed[index], alone[0], atol=BOUND)
