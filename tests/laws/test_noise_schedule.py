"""Grids and clocks: inverses, edges, and what is known in closed form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.noise_schedule import ADM_TIME, EDM_TIME, KarrasGrid, karras_sigma, model_time, sigma_at_time
from cm_jax.errors import InputError
from tests.support import DATA


@pytest.mark.parametrize("grid", [KarrasGrid(), KarrasGrid(201), KarrasGrid(7, 0.01, 50.0, 3.0)])
def test_index_and_sigma_are_inverses(grid):
    indices = np.arange(grid.levels)
    np.testing.assert_allclose(grid.index(grid.sigma(indices)), indices, atol=1e-9)
    assert grid.sigma(0) == pytest.approx(grid.sigma_max, rel=1e-12)
    assert grid.sigma(grid.levels - 1) == pytest.approx(grid.sigma_min, rel=1e-12)
    assert (np.diff(grid.sigma(indices)) < 0).all()


@pytest.mark.parametrize("factor", [ADM_TIME, EDM_TIME])
def test_time_and_sigma_are_inverses(factor):
    sigmas = jnp.array([0.002, 0.5, 1.0, 80.0])
    np.testing.assert_allclose(sigma_at_time(model_time(sigmas, factor), factor), sigmas, rtol=1e-5)


def test_the_two_clocks():
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
def test_tuned_levels_of_the_original_in_double_precision(levels, index, sigma):
    assert KarrasGrid(levels).sigma(index) == pytest.approx(sigma, rel=1e-14)


def test_descending_levels_are_the_originals():
    recorded = json.loads((DATA / "openai" / "karras_sigmas.json").read_text())
    for count, sigmas in recorded.items():
        np.testing.assert_allclose(KarrasGrid().descending(int(count)), sigmas[:-1], rtol=2e-6)


def test_a_growing_grid_compiles_once():
    compiled = jax.jit(karras_sigma)
    for levels in (3, 18, 151):
        sigmas = compiled(jnp.arange(3), jnp.asarray(levels, jnp.float32))
        np.testing.assert_allclose(sigmas, KarrasGrid(levels).sigma(np.arange(3)), rtol=2e-5)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "wrong", [{"levels": 1}, {"sigma_min": 0.0}, {"sigma_min": 90.0}, {"rho": 0.0}, {"sigma_max": float("inf")}]
)
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(InputError, match="levels >= 2"):
        KarrasGrid(**wrong)
