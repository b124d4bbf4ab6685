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


@pytest.mark.parametrize("batch", [1, 6, 7])
def test_a_batch_in_parts_is_the_batch(batch, monkeypatch):
    x, kernel = normal(0, batch, 8, 8, 5), winograd.transform(normal(1, 3, 3, 5, 4), 6, 4)
    whole = winograd.convolve(x, kernel)
    monkeypatch.setattr(winograd, "_CACHED", 3 * 8 * 8 * 5)
    mapped = jax.make_jaxpr(winograd.convolve)(x, kernel)
    assert ("scan" in str(mapped)) == (batch > 3)
    np.testing.assert_allclose(winograd.convolve(x, kernel), whole, atol=1e-6)


def test_derivatives_are_those_of_the_direct_convolution(monkeypatch):
    monkeypatch.setattr(winograd, "_CACHED", 8 * 8 * 5)
    x, direction, kernel = normal(0, 3, 8, 8, 5), normal(2, 3, 8, 8, 5), normal(1, 3, 3, 5, 4)
    transformed = winograd.transform(kernel, 6, 4)
    _, forward = jax.jvp(lambda x: winograd.convolve(x, transformed), (x,), (direction,))
    assert relative(forward, exact(direction, kernel)) < 5e-6
    seen = normal(3, 3, 8, 8, 4)
    (reverse,) = jax.vjp(lambda x: winograd.convolve(x, transformed), x)[1](seen)
    (direct,) = jax.vjp(lambda x: convolve_3x3(x, kernel), x)[1](seen)
    assert relative(reverse, direct) < 5e-6


@pytest.mark.parametrize("form", [(4, 4), (6, 4), (6, 6)])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 2)])
def test_a_kernels_gradient_is_that_of_the_direct_convolution(form, size):
    x, kernel, seen = normal(0, 2, *size, 5), normal(1, 3, 3, 5, 4), normal(3, 2, *size, 4)
    (direct,) = jax.vjp(lambda kernel: convolve_3x3(x, kernel), kernel)[1](seen)
    assert relative(winograd.kernel_gradient(x, seen, *form), direct) < 1e-5


def test_a_kernels_gradient_in_parts_is_that_of_the_batch(monkeypatch):
    x, seen = normal(0, 6, 8, 8, 5), normal(3, 6, 8, 8, 4)
    whole = winograd.kernel_gradient(x, seen, 6, 4)
    monkeypatch.setattr(winograd, "_CACHED", 8 * 8 * 5)
    assert "scan" in str(jax.make_jaxpr(lambda *both: winograd.kernel_gradient(*both, 6, 4))(x, seen))
    assert relative(winograd.kernel_gradient(x, seen, 6, 4), whole) < 1e-5


@pytest.fixture
def trained(monkeypatch):
    """Winograd's forms where a kernel is trained, for few channels too, and counts of their use."""
    count = {"outputs": 0, "gradients": 0}
    convolve, gradient = winograd.convolve, winograd.kernel_gradient

    def counted(name, function):
        return lambda *arguments: count.update({name: count[name] + 1}) or function(*arguments)

    monkeypatch.setattr(winograd, "training_form", lambda *shape: (6, 3))
    monkeypatch.setattr(winograd, "gradient_form", lambda *shape: (6, 4))
    monkeypatch.setattr(winograd, "convolve", counted("outputs", convolve))
    monkeypatch.setattr(winograd, "kernel_gradient", counted("gradients", gradient))
    return count


def quick(x, kernel):
    return convolve_3x3(x, kernel, method="auto")


def test_all_derivatives_of_a_trained_convolution_are_the_direct_ones(trained):
    x, kernel = normal(0, 3, 6, 8, 5), normal(1, 3, 3, 5, 4)
    moved_x, moved_kernel, seen = normal(2, *x.shape), normal(4, *kernel.shape), normal(3, 3, 6, 8, 4)

    def derivatives(convolve):
        y, both = jax.jvp(convolve, (x, kernel), (moved_x, moved_kernel))
        _, by_x = jax.jvp(lambda x: convolve(x, kernel), (x,), (moved_x,))
        reverse = jax.vjp(convolve, x, kernel)[1](seen)
        energy = lambda x, kernel: jnp.sum(convolve(x, kernel) ** 2 * seen)  # noqa: E731
        _, second = jax.jvp(jax.grad(energy, (0, 1)), (x, kernel), (moved_x, moved_kernel))
        again = jax.grad(jax.checkpoint(energy), (0, 1))(x, kernel)
        each = jax.vmap(jax.grad(lambda x, kernel: convolve(x[None], kernel).sum() ** 2, 1), (0, None))(x, kernel)
        return y, both, by_x, reverse, second, again, each

    direct = derivatives(convolve_3x3)
    assert trained == {"outputs": 0, "gradients": 0}
    for ours, theirs in zip(jax.tree.leaves(derivatives(quick)), jax.tree.leaves(direct), strict=True):
        assert relative(ours, theirs) < 1e-5
    assert min(trained.values()) > 0


@pytest.mark.parametrize(
    ("case", "dtype"), [({"method": "direct"}, jnp.float32), ({}, jnp.bfloat16), ({"stride": 2}, jnp.float32)]
)
def test_what_is_not_quick_is_direct(case, dtype, trained):
    x, kernel = normal(0, 1, 4, 4, 3).astype(dtype), normal(1, 3, 3, 3, 4)
    convolve_3x3(x, kernel, **({"method": "auto"} | case))
    assert trained["outputs"] == 0


@pytest.mark.parametrize("network", [SMALL, dataclasses.replace(SMALL, resampling="convolution")])
def test_a_networks_gradient_is_the_same_directly(network, trained):
    params = random_params(network)
    x, time, labels = normal(0, 2, 16, 16, 3), jnp.array([100.0, -300.0]), jnp.array([3, 8])

    def loss(params, network):
        return jnp.mean((network.predict(params, x, time, labels) - x) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    direct = gradient(params, network.convolving("direct"))
    assert trained == {"outputs": 0, "gradients": 0}
    for ours, theirs in zip(jax.tree.leaves(gradient(params, network)), jax.tree.leaves(direct), strict=True):
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max() + 1e-7
    assert min(trained.values()) >= 10


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
    direct_config = dataclasses.replace(config, network=config.network.convolving("direct"))
    fast, direct = Model(config, params), Model(direct_config, params)
    np.testing.assert_allclose(fast.sample(0, 2, labels=3), direct.sample(0, 2, labels=3), atol=2e-5)
    fast.save(tmp_path / "saved")
    _, saved = restore(tmp_path / "saved")
    assert jax.tree.structure(saved) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, saved, params)
