"""Weightings against the preconditioning they come from; distances against their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.losses import (
    SNR,
    Absolute,
    InverseGap,
    Karras,
    Perceptual,
    PseudoHuber,
    SNRPlusOne,
    Squared,
    TruncatedSNR,
    Uniform,
)
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives.distances import Resized

SIGMA = jnp.array([0.002, 0.3, 1.0, 7.0, 80.0])
X, Y = (jax.random.uniform(key, (3, 8, 8, 3), minval=-1) for key in jax.random.split(jax.random.key(0)))


def test_karras_is_one_over_the_square_of_edms_c_out():
    for sigma_data in (0.5, 0.2):
        weights = Karras()(SIGMA, 0 * SIGMA, sigma_data)
        np.testing.assert_allclose(weights * EDMPreconditioning(sigma_data).c_out(SIGMA) ** 2, 1, rtol=1e-6)


def test_weightings_meet_where_they_must():
    zero = jnp.zeros_like(SIGMA)
    np.testing.assert_allclose(SNR()(SIGMA, zero) * SIGMA**2, Uniform()(SIGMA, zero), rtol=1e-6)
    np.testing.assert_allclose(SNRPlusOne()(SIGMA, zero), Karras()(SIGMA, zero, 1.0), rtol=1e-6)
    np.testing.assert_array_equal(TruncatedSNR()(SIGMA, zero) == 1, SIGMA >= 1)
    np.testing.assert_allclose(TruncatedSNR()(SIGMA, zero)[:2], SNR()(SIGMA, zero)[:2])
    np.testing.assert_allclose(InverseGap()(SIGMA, zero) ** 2, SNR()(SIGMA, zero), rtol=1e-6)
    np.testing.assert_allclose(InverseGap()(SIGMA, SIGMA / 2), 2 / SIGMA, rtol=1e-6)


@pytest.mark.parametrize(
    "distance", [Absolute(), Squared(), PseudoHuber(), PseudoHuber(0.0), Resized(Squared(), 5), Resized(Absolute(), 16)]
)
def test_a_distance_is_zero_at_home_positive_elsewhere_and_per_image(distance):
    np.testing.assert_array_equal(distance(X, X), np.zeros(3))
    values = distance(X, Y)
    assert (values > 0).all()
    np.testing.assert_allclose(distance(Y, X), values, rtol=1e-6)
    np.testing.assert_allclose(distance(X[1:2], Y[1:2]), values[1:2], rtol=1e-6)
    gradient = jax.grad(lambda x: distance(x, X).sum())(X)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(X))


def test_pseudo_huber_is_one_norm_per_image_between_two_limits():
    norm = np.linalg.norm(np.asarray(X - Y, np.float64).reshape(3, -1), axis=1)
    np.testing.assert_allclose(PseudoHuber(0.0)(X, Y), norm, rtol=1e-6)
    large = 1e3
    c = large * np.sqrt(X[0].size)
    np.testing.assert_allclose(2 * c * PseudoHuber(large)(X, Y), norm**2, rtol=1e-5)
    c = 0.00054 * np.sqrt(X[0].size)
    np.testing.assert_allclose(PseudoHuber()(X, Y), np.sqrt(norm**2 + c**2) - c, rtol=1e-6)


def test_pseudo_huber_constants_of_ict():
    """c = 0.02993 at 32 pixels and 0.05986 at 64: for a far smaller difference the distance is its square over 2 c."""
    for size, c in ((32, 0.02993), (64, 0.05986)):
        x = jnp.zeros((1, size, size, 3)).at[0, 0, 0, 0].set(1e-5)
        assert PseudoHuber()(x, 0 * x)[0] == pytest.approx(1e-10 / (2 * c), rel=1e-3)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_resizing_keeps_constants_and_resizes_as_pytorch_does(size):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")

    difference = jnp.full_like(X, 0.3)
    np.testing.assert_allclose(Resized(Squared(), size)(X + difference, X), 0.09, rtol=1e-5)
    inputs = [torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) for images in (X, Y)]
    x, y = (torch.nn.functional.interpolate(i, size=(size, size), mode="bilinear", align_corners=False) for i in inputs)
    np.testing.assert_allclose(Resized(Squared(), size)(X, Y), ((x - y) ** 2).mean((1, 2, 3)).numpy(), rtol=1e-6)


def test_halving_the_image_averages_squares_of_four():
    """Without antialiasing, 16 to 8 pixels is the mean over 2x2 squares; with it, neighbors would enter."""
    x, y = (jnp.repeat(jnp.repeat(images, 2, 1), 2, 2) for images in (X, Y))
    np.testing.assert_allclose(Resized(Squared(), 8)(x, y), Squared()(X, Y), rtol=1e-6)


def test_perceptual_distance_sees_directions_of_features_only():
    heads = (jnp.ones(3), jnp.array([1.0, 0.0]))
    layers = Perceptual(lambda images: (images, images[:, ::2, ::2, :2]), heads)
    np.testing.assert_allclose(layers(X, 3 * X), np.zeros(3), atol=1e-10)
    first = np.square(_unit(X) - _unit(Y)).sum(-1).mean((1, 2))
    second = np.square(_unit(X[:, ::2, ::2, :2]) - _unit(Y[:, ::2, ::2, :2]))[..., 0].mean((1, 2))
    np.testing.assert_allclose(layers(X, Y), first + second, rtol=1e-5)
    opposite = layers(X, -X)
    assert (opposite > 4).all()


def test_perceptual_distance_is_differentiable_where_all_features_are_zero():
    layers = Perceptual(lambda images: (images * (images > 0.9),), (jnp.ones(3),))
    gradient = jax.grad(lambda x: layers(x, Y).sum())(X)
    assert jnp.isfinite(gradient).all()
    hash(layers)


def test_impossible_distances_are_refused():
    with pytest.raises(InputError, match="scale of at least 0"):
        PseudoHuber(-1.0)
    with pytest.raises(InputError, match="at least 1"):
        Resized(Squared(), 0)


def _unit(features):
    features = np.asarray(features, np.float64)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
