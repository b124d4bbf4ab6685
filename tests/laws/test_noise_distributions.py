"""Noise distributions: moments, probabilities and ranges, and independence of the images of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.noise_distributions import (
    CappedInterval,
    DiscreteLogNormal,
    LogitNormal,
    LogNormal,
    SortedInterval,
    UniformIndex,
)
from cm_jax.diffusion.noise_schedule import KarrasSchedule, sigma_at_trigflow_time, trigflow_time
from cm_jax.errors import InputError

KEYS = jax.random.split(jax.random.key(0), 200_000)
SCHEDULE = KarrasSchedule()


def test_log_normal_has_its_moments():
    logs = jnp.log(LogNormal()(KEYS))
    assert logs.mean() == pytest.approx(-1.2, abs=0.01)
    assert logs.std() == pytest.approx(1.2, abs=0.01)


def test_logit_normal_has_its_moments():
    times = LogitNormal()(KEYS)
    logits = jnp.log(times) - jnp.log1p(-times)
    assert logits.mean() == pytest.approx(-0.4, abs=0.01)
    assert logits.std() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("levels", [2, 11, 151])
@pytest.mark.parametrize("noise_distribution", [UniformIndex(), DiscreteLogNormal()])
def test_indices_have_their_probabilities(noise_distribution, levels):
    indices = np.asarray(noise_distribution(KEYS, SCHEDULE, levels))
    assert indices.min() >= 0
    assert indices.max() <= levels - 2
    share = np.bincount(indices, minlength=levels - 1) / len(KEYS)
    exact = (
        noise_distribution.probabilities(SCHEDULE, levels)
        if isinstance(noise_distribution, DiscreteLogNormal)
        else np.full(levels - 1, 1 / (levels - 1))
    )
    std = np.sqrt(np.asarray(exact) * (1 - np.asarray(exact)) / len(KEYS))
    assert (np.abs(share - exact) <= 4.5 * std + 1e-6).all()


def test_the_probabilities_are_those_of_the_paper():
    """P(i) of iCT, whose levels rise from i = 1, with the error function from the standard library."""
    import math

    sigma = SCHEDULE.sigma(np.arange(11), 11)[::-1]
    value = np.array([math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in sigma])
    masses = np.diff(value) / np.diff(value).sum()
    np.testing.assert_allclose(DiscreteLogNormal().probabilities(SCHEDULE, 11)[::-1], masses, rtol=1e-4)


@pytest.mark.parametrize("noise_distribution", [UniformIndex(), DiscreteLogNormal()])
def test_a_growing_number_of_levels_compiles_once(noise_distribution):
    compiled = jax.jit(lambda keys, levels: noise_distribution(keys, SCHEDULE, levels))
    for levels in (3, 18, 151):
        indices = compiled(KEYS[:1000], jnp.int32(levels))
        assert (indices >= 0).all()
        assert (indices <= levels - 2).all()
        np.testing.assert_array_equal(indices, noise_distribution(KEYS[:1000], SCHEDULE, levels))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "noise_distribution",
    [
        LogNormal(),
        LogitNormal(),
        SortedInterval(),
        CappedInterval(),
        lambda keys: UniformIndex()(keys, SCHEDULE, 40),
        lambda keys: DiscreteLogNormal()(keys, SCHEDULE, 40),
    ],
)
def test_samples_of_an_image_do_not_depend_on_the_other_images(noise_distribution):
    whole = noise_distribution(KEYS[:8])
    order = jnp.array([5, 2, 7])
    jax.tree.map(
        np.testing.assert_array_equal, noise_distribution(KEYS[order]), jax.tree.map(lambda part: part[order], whole)
    )
    assert all(len(np.unique(part)) > 3 for part in jax.tree.leaves(whole))


@pytest.mark.parametrize(
    "noise_distribution", [SortedInterval(), CappedInterval(), SortedInterval(flow_matching_ratio=0.0)]
)
def test_intervals_are_ordered_and_have_their_flow_matching_ratio(noise_distribution):
    t, r = noise_distribution(KEYS)
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()
    if isinstance(noise_distribution, SortedInterval):
        assert (r == t).mean() == pytest.approx(noise_distribution.flow_matching_ratio, abs=0.01)


def test_a_capped_interval_does_not_change_the_distribution_of_t():
    t, _ = CappedInterval()(KEYS)
    logits = jnp.log(t) - jnp.log1p(-t)
    assert logits.mean() == pytest.approx(-0.6, abs=0.015)
    assert logits.std() == pytest.approx(1.6, abs=0.015)


def test_trigflow_time_and_sigma_are_inverses():
    sigma = jnp.array([0.002, 0.821, 1.526, 80.0, 800.0])
    np.testing.assert_allclose(trigflow_time(sigma)[1:], [1.0238, 1.2542, 1.56455, 1.57017], atol=1e-4)
    np.testing.assert_allclose(sigma_at_trigflow_time(trigflow_time(sigma)), sigma, rtol=1e-3)
    np.testing.assert_allclose(sigma_at_trigflow_time(jnp.array([1.1])), [0.982], atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogNormal(0.0, 0.0),
        lambda: DiscreteLogNormal(std=-1.0),
        lambda: LogitNormal(0.0, 0.0),
        lambda: SortedInterval(flow_matching_ratio=1.5),
        lambda: KarrasSchedule(0.0),
    ],
)
def test_impossible_distributions_are_refused(make):
    with pytest.raises(InputError, match=r"positive|\[0, 1\]|sigma_min"):
        make()
