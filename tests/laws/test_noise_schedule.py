"""Noise schedules and c_noise: inverses, edges and closed forms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.noise_schedule import ADM_TIME, EDM_TIME, KarrasSchedule, model_time, sigma_at_time
from cm_jax.errors import InputError
from tests.support import DATA


@pytest.mark.parametrize(
    ("schedule", "num_levels"), [(KarrasSchedule(), 40), (KarrasSchedule(), 201), (KarrasSchedule(0.01, 50.0, 3.0), 7)]
)
def test_index_and_sigma_are_inverses(schedule, num_levels):
    indices = np.arange(num_levels)
    sigmas = schedule.sigma(indices, num_levels)
    np.testing.assert_allclose(schedule.index(sigmas, num_levels), indices, atol=1e-9)
    assert schedule.sigma(0, num_levels) == pytest.approx(schedule.sigma_max, rel=1e-12)
    assert schedule.sigma(num_levels - 1, num_levels) == pytest.approx(schedule.sigma_min, rel=1e-12)
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("factor", [ADM_TIME, EDM_TIME])
def test_time_and_sigma_are_inverses(factor):
    sigmas = jnp.array([0.002, 0.5, 1.0, 80.0])
    np.testing.assert_allclose(sigma_at_time(model_time(sigmas, factor), factor), sigmas, rtol=1e-5)


def test_c_noise_of_adm_and_edm():
    assert model_time(jnp.array(80.0)) == pytest.approx(1095.5066, abs=2e-4)
    assert model_time(jnp.array(0.002)) == pytest.approx(-1553.652, abs=2e-4)
    assert model_time(jnp.array(jnp.e), EDM_TIME) == pytest.approx(0.25, rel=1e-6)
    assert jnp.isfinite(model_time(jnp.array(0.0)))


@pytest.mark.parametrize(
    ("levels", "index", "sigma"),
    [
        (40, 22, 1.3823679566485092),
        (40, 17, 4.3655616856823185),
        (40, 18, 3.5196988314663527),
        (201, 106, 1.9128436206953614),
        (151, 67, 3.9912186130881535),
        (151, 62, 5.248503227486487),
    ],
)
def test_tuned_levels_of_openai_in_double_precision(levels, index, sigma):
    assert KarrasSchedule().sigma(index, levels) == pytest.approx(sigma, rel=1e-14)


def test_descending_levels_are_openais():
    recorded = json.loads((DATA / "openai" / "karras_sigmas.json").read_text())
    for count, sigmas in recorded.items():
        np.testing.assert_allclose(KarrasSchedule().descending(int(count)), sigmas[:-1], rtol=2e-6)


def test_a_growing_number_of_levels_compiles_once():
    compiled = jax.jit(KarrasSchedule().sigma)
    for levels in (3, 18, 151):
        sigmas = compiled(jnp.arange(3), jnp.asarray(levels, jnp.float32))
        np.testing.assert_allclose(sigmas, KarrasSchedule().sigma(np.arange(3), levels), rtol=2e-5)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("wrong", [{"sigma_min": 0.0}, {"sigma_min": 90.0}, {"rho": 0.0}, {"sigma_max": float("inf")}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(InputError, match="0 < sigma_min < sigma_max"):
        KarrasSchedule(**wrong)
