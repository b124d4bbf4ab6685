"""Post-hoc EMA: profiles against quadrature and the EMA update, and reconstructed EMAs against direct ones."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from cm_jax.checkpoints.power_profiles import Profile, combine, gamma, inner_products

PROFILES = [Profile(400, 0.05), Profile(400, 0.1), Profile(700, 0.05), Profile(1000, 0.1), Profile(1000, 0.2)]


def density(profile, tau):
    power = gamma(profile.width)
    return (power + 1) * tau**power / profile.steps ** (power + 1) if tau <= profile.steps else 0.0


def integral(function, end):
    return quad(function, 0, end, epsabs=0, epsrel=1e-11, limit=200)[0]


def emas(width, trajectory):
    """The EMA after each step, by the update ema <- beta ema + (1 - beta) params."""
    power, ema, found = gamma(width) + 1, 0.0, []
    for t, params in enumerate(trajectory, start=1):
        beta = (1 - 1 / t) ** power
        ema = beta * ema + (1 - beta) * params
        found.append(ema)
    return np.array(found)


def snapshots(steps, count, widths=(0.05, 0.1)):
    return [Profile(steps * (index + 1) // count, width) for index in range(count) for width in widths]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_has_its_width(profile):
    mean = integral(lambda tau: tau * density(profile, tau), profile.steps)
    square = integral(lambda tau: tau**2 * density(profile, tau), profile.steps)
    assert math.sqrt(square - mean**2) / profile.steps == pytest.approx(profile.width, rel=1e-6)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_ema_update_has_the_integrals_of_the_profile_as_weights(profile):
    ends = (np.arange(profile.steps + 1) / profile.steps) ** (gamma(profile.width) + 1)
    found = emas(profile.width, np.eye(profile.steps))[-1]
    np.testing.assert_allclose(found, np.diff(ends), rtol=1e-9, atol=1e-15)


def test_inner_products_equal_quadrature():
    found = inner_products(PROFILES, PROFILES)
    for i, a in enumerate(PROFILES):
        for j, b in enumerate(PROFILES):
            product = integral(lambda tau, a=a, b=b: density(a, tau) * density(b, tau), min(a.steps, b.steps))
            assert found[i, j] == pytest.approx(product, rel=1e-9)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2])
def test_weights_solve_the_normal_equations(width):
    """Of the least-squares problem on a grid of times, up to the factor that makes their sum 1."""
    profiles, target = snapshots(100, 5), Profile(100, width)
    nodes, spacing = np.polynomial.legendre.leggauss(40)
    times, areas = zip(*(((nodes + 1) * 10 + start, spacing * 10) for start in range(0, 100, 20)), strict=True)
    times, areas = np.concatenate(times), np.concatenate(areas)
    columns = np.array([[density(each, tau) for tau in times] for each in (*profiles, target)]).T
    scaled = columns * np.sqrt(areas)[:, None]
    solved = np.linalg.lstsq(scaled[:, :-1], scaled[:, -1], rcond=None)[0]
    found = combine(profiles, target)
    np.testing.assert_allclose(found.weights, solved / solved.sum(), atol=1e-6)
    left = np.linalg.norm(scaled[:, :-1] @ found.weights - scaled[:, -1])
    assert found.residual == pytest.approx(left / np.linalg.norm(scaled[:, -1]), rel=1e-6)


@pytest.mark.parametrize("count", [1, 4, 100])
def test_a_tracked_width_is_returned(count):
    profiles = snapshots(10**6, count)
    for index, width in ((-2, 0.05), (-1, 0.1)):
        found = combine(profiles, Profile(10**6, width))
        expected = np.eye(len(profiles))[index]
        np.testing.assert_allclose(found.weights, expected, atol=1e-6)
        assert found.residual < 1e-5


@pytest.mark.parametrize("width", [0.005, 0.03, 0.15, 0.288])
def test_constant_parameters_stay_constant(width):
    assert sum(combine(snapshots(10**5, 30), Profile(10**5, width)).weights) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15])
def test_reconstructed_ema_of_a_trajectory(width):
    """|error| <= residual |p| |theta| (Cauchy-Schwarz, with theta less a constant), which more snapshots reduce."""
    steps = 2_000
    dice = np.random.default_rng(0)
    trajectory = np.exp(-np.arange(1, steps + 1) / 700) + 0.02 * dice.normal(size=steps).cumsum()
    target, tracked = Profile(steps, width), {each: emas(each, trajectory) for each in (0.05, 0.1)}
    exact = emas(width, trajectory)[-1]
    spread, bounds = np.linalg.norm(trajectory - exact), []
    for count in (4, 8, 16, 32):
        profiles = snapshots(steps, count)
        found = combine(profiles, target)
        values = [tracked[each.width][each.steps - 1] for each in profiles]
        bounds.append(found.residual * math.sqrt(inner_products([target], [target])[0, 0]) * spread)
        assert abs(np.dot(found.weights, values) - exact) <= bounds[-1] + 1e-9
    assert bounds[-1] < 0.2 * bounds[0]
    assert bounds[-1] < 0.03 * (trajectory.max() - trajectory.min())
