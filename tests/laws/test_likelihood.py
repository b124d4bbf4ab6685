"""Bits per dimension: closed forms for Gaussian data, order of convergence, unbiased divergence estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import InMemory
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.evaluation import bits_per_dimension, evaluate_bits, log_density
from cm_jax.model import Model
from tests.support import gaussian_denoiser
from tests.toy import ToyNetwork

RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}


def probes(seed, shape):
    return jax.random.rademacher(jax.random.key(seed), shape, jnp.float32)


def exact(x, std):
    """ln N(x; 0, std^2 + sigma_min^2), per image."""
    variance = std**2 + 0.002**2
    return -(np.asarray(x, np.float64) ** 2 / variance + np.log(2 * np.pi * variance)).sum((1, 2, 3)) / 2


def error(steps, std, assumed_std, x):
    """Largest error in bits per dimension. The solver assumes `assumed_std`; the data of the denoiser have `std`."""
    found = log_density(gaussian_denoiser(std), x, probes(1, x.shape), steps=steps, std=assumed_std, **RANGE)
    return np.abs(np.asarray(found) - exact(x, std)).max() / x[0].size / np.log(2)


@pytest.mark.parametrize("std", [0.1, 0.5, 2.0])
def test_log_density_of_gaussian_data_has_the_closed_form(std):
    x = std * jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    assert error(64, std, std, x) < 2e-5
    assert error(256, std, 0.5, x) < 2e-3  # as with real data, the assumed std differs from that of the data


def test_the_solver_has_second_order():
    x = 0.1 * jax.random.normal(jax.random.key(0), (4, 4, 4, 3))
    coarse, fine = (error(steps, 0.1, 0.5, x) for steps in (32, 64))
    assert 3 < coarse / fine < 5.5


def test_the_divergence_estimate_is_unbiased():
    """Data with correlated pixels: one probe has an error, the mean over many probes has none."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(12, 12)) / 6
    covariance = mix @ mix.T + 0.05 * np.eye(12)
    values, basis = (each.astype(np.float32) for each in np.linalg.eigh(covariance))

    def denoiser(x, sigma):
        inner = x.reshape(len(x), -1) @ basis
        return ((inner * (values / (values + sigma[:, None] ** 2))) @ basis.T).reshape(x.shape)

    point = rng.multivariate_normal(np.zeros(12), covariance)
    count = 4000
    x = jnp.broadcast_to(jnp.asarray(point, jnp.float32).reshape(1, 2, 2, 3), (count, 2, 2, 3))
    found = np.asarray(log_density(denoiser, x, probes(2, x.shape), steps=200, std=0.4, **RANGE), np.float64)
    wide = covariance + 0.002**2 * np.eye(12)
    expected = -(point @ np.linalg.solve(wide, point) + np.linalg.slogdet(2 * np.pi * wide)[1]) / 2
    assert found.std() > 0.1
    assert abs(found.mean() - expected) < 4 * found.std() / count**0.5 + 0.02


DENOISER = EDMPreconditioning(sigma_data=0.3)


def model(preconditioning=DENOISER, classes=None):
    """A network with zero output: with the EDM preconditioning, the exact denoiser of N(0, sigma_data^2)."""
    network = ToyNetwork(classes=classes)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), network.shapes())
    config = object.__new__(ModelConfig)  # without validation, which refuses a toy network
    fields = {"network": network, "preconditioning": preconditioning, "schedule": KarrasSchedule(), "num_levels": 40}
    for name, value in (
        fields | {"class_names": (), "tuned_timesteps": (), "tuned_sigmas": (), "consistency": None}
    ).items():
        object.__setattr__(config, name, value)
    return Model(config, params)


def test_bits_of_a_gaussian_model_have_the_closed_form_and_do_not_depend_on_batches():
    images = np.random.default_rng(0).integers(60, 200, (300, 4, 4, 3)).astype(np.uint8)
    bits = bits_per_dimension(model(), images, seed=1)
    centers = images / 127.5 - 1
    variance = 0.3**2 + 0.002**2
    second_moment = centers**2 + 1 / (12 * 127.5**2)  # of a pixel value spread uniformly over its quantization bin
    nats = (second_moment / variance + np.log(2 * np.pi * variance)).mean((1, 2, 3)) / 2
    expected = nats / np.log(2) + np.log2(127.5)
    np.testing.assert_allclose(bits, expected, atol=0.02)
    assert bits.mean() == pytest.approx(expected.mean(), abs=5e-4)
    apart = [bits_per_dimension(model(), images[i : i + 100], seed=1, start=i, batch_size=8) for i in (0, 100, 200)]
    np.testing.assert_allclose(np.concatenate(apart), bits, atol=1e-5)


def test_bits_of_a_data_set_and_invalid_inputs():
    images = np.random.default_rng(0).integers(0, 255, (10, 4, 4, 3)).astype(np.uint8)
    labeled = InMemory(images, np.arange(10) % 3)
    report = evaluate_bits(model(classes=3), labeled, 7, steps=8, batch_size=8, names=("a toy", "noise"))
    assert report.line.startswith(f"bits per dimension {report.values['bpd']:.4f}")
    assert "N = 7 of noise under a toy" in report.line
    with pytest.raises(InputError, match="has no labels"):
        evaluate_bits(model(classes=3), InMemory(images), 7)
    with pytest.raises(InputError, match="need a denoiser"):
        bits_per_dimension(model(ConsistencyPreconditioning()), images)
    with pytest.raises(InputError, match=r"of shape \[4, 4, 3\], got \[10, 4, 3, 3\]"):
        bits_per_dimension(model(), images[:, :, :3])
    with pytest.raises(InputError, match="from 2 to 10, got 11"):
        evaluate_bits(model(classes=3), labeled, 11)
