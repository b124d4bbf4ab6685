"""Convolutions with fewer multiplications are the same convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax import Model
from cm_jax.checkpoints import restore
from cm_jax.config import ModelConfig
from cm_jax.networks import ADMUNet, SongUNet, accelerated, winograd
from cm_jax.networks.convolution import convolve_3x3
from cm_jax.noise_levels import KarrasGrid
from cm_jax.preconditioning import BoundaryScaling
from tests.support import random_params, relative

FORMS = [(4, 3), (4, 4), (6, 3), (6, 4), (6, 6)]
SMALL = ADMUNet(image_size=16, width=32, multipliers=(1, 2), blocks_per_level=1, attention_factors=(2,), classes=10)


@pytest.fixture
def eager(monkeypatch):
    """Transforms for networks of few channels too, of another form on each level."""
    monkeypatch.setattr(winograd, "form", lambda size, *channels: (6, 3) if size == 16 else (6, 4))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def exact(x, kernel):
    """The direct convolution in double precision."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in shifts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 2), (4, 9)])
def test_every_form_is_the_direct_convolution_on_any_size(form, size):
    x, kernel = normal(0, 2, *size, 5), normal(1, 3, 3, 5, 4)
    out = winograd.convolve(x, winograd.transform(kernel, *form))
    assert out.shape == (2, *size, 4)
    assert relative(out, exact(x, kernel)) < 5e-6


def test_derivatives_are_those_of_the_direct_convolution():
    x, direction, kernel = normal(0, 3, 8, 8, 5), normal(2, 3, 8, 8, 5), normal(1, 3, 3, 5, 4)
    transformed = winograd.transform(kernel, 6, 4)
    _, forward = jax.jvp(lambda x: winograd.convolve(x, transformed), (x,), (direction,))
    assert relative(forward, exact(direction, kernel)) < 5e-6
    seen = normal(3, 3, 8, 8, 4)
    (reverse,) = jax.vjp(lambda x: winograd.convolve(x, transformed), x)[1](seen)
    (direct,) = jax.vjp(lambda x: convolve_3x3(x, kernel), x)[1](seen)
    assert relative(reverse, direct) < 5e-6


@pytest.mark.parametrize(("batch", "at_once"), [(1, 1), (6, 3), (7, 1), (2, 2)])
def test_a_large_network_sees_a_batch_in_parts(batch, at_once, eager, monkeypatch):
    params = random_params(SMALL)
    fast = accelerated(SMALL, params)
    x, times, labels = normal(0, batch, 16, 16, 3), 100.0 * jnp.arange(batch), jnp.arange(batch) % 10
    seen = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda x, kernel: seen.append(len(x)) or convolve(x, kernel))
    monkeypatch.setattr(winograd, "_CACHED", 3 * 16 * 16 * 32)
    out = jax.jit(SMALL.predict)(fast, x, times, labels)
    assert set(seen) == {at_once}
    assert relative(out, jax.jit(SMALL.predict)(params, x, times, labels)) < 1e-5


def test_training_sees_its_batch_at_once(monkeypatch):
    monkeypatch.setattr(winograd, "_CACHED", 1)
    inputs = (random_params(SMALL), normal(0, 4, 16, 16, 3), jnp.arange(4.0), jnp.arange(4))
    assert "scan" not in str(jax.make_jaxpr(SMALL.predict)(*inputs))


SONG = SongUNet(image_size=16, width=32, multipliers=(1, 2), blocks_per_level=1, classes=None)


@pytest.mark.parametrize("network", [dataclasses.replace(SMALL, resampling="convolution"), SONG])
def test_an_accelerated_network_is_the_same_network(network, eager, monkeypatch):
    params = random_params(network)
    x, time = normal(0, 2, 16, 16, 3), jnp.array([100.0, -300.0])
    labels = None if network.classes is None else jnp.array([3, 8])
    seen = []
    convolve = winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda x, kernel: seen.append((x.shape, kernel.shape)) or convolve(x, kernel)
    )
    fast = accelerated(network, params)
    out = jax.jit(network.predict)(fast, x, time, labels)
    assert relative(out, jax.jit(network.predict)(params, x, time, labels)) < 1e-5
    for (_, height, _, channels), (*form, kernel_in, kernel_out) in seen:
        assert channels == kernel_in
        assert tuple(form) == winograd.form(height, kernel_in, kernel_out)
    expected = 2 * sum(unit.kind == "residual" for block in network.plan().blocks for unit in block.units)
    plain = [unit for block in network.plan().blocks for unit in block.units if unit.kind == "convolution"]
    assert len(seen) == expected + sum(unit.resample != "down" for unit in plain)


def test_half_precision_is_left_as_it_is(eager):
    params = random_params(SMALL)
    assert accelerated(dataclasses.replace(SMALL, precision="bfloat16"), params) is params


def test_networks_of_few_channels_are_left_as_they_are():
    assert jax.tree.structure(accelerated(SMALL, random_params(SMALL))) == jax.tree.structure(SMALL.shapes())


def test_a_model_draws_the_same_with_and_without_and_saves_what_it_was_given(eager, tmp_path):
    params = random_params(SMALL)
    config = ModelConfig(SMALL, BoundaryScaling(), KarrasGrid())
    fast, direct = (Model(config, params, winograd=on) for on in (True, False))
    np.testing.assert_allclose(fast.sample(0, 2, labels=3), direct.sample(0, 2, labels=3), atol=2e-5)
    fast.save(tmp_path / "saved")
    _, saved = restore(tmp_path / "saved")
    assert jax.tree.structure(saved) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, saved, params)
