"""Orders of convergence, number of calls, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.samplers import (
    DPM,
    SAMPLERS,
    Ancestral,
    Churn,
    Consistency,
    Euler,
    Heun,
    ProgressiveEuler,
    ScoreSDE,
    Segments,
    VESchedule,
    VPSchedule,
    choose_levels,
)
from tests.support import gaussian_denoiser

SCHEDULE, N = KarrasSchedule(), 40


def counted(denoiser):
    """The denoiser, and a list that grows at every call while the program runs."""
    calls = []

    def counting(x, sigma):
        jax.debug.callback(lambda: calls.append(1), ordered=False)
        return denoiser(x, sigma)

    return counting, calls


def walk(sampler, levels, draw, denoiser=None):
    return sampler(denoiser or gaussian_denoiser(), jnp.asarray(levels, jnp.float32), draw)


def whole_way(std):
    """The exact denoiser as a function of segments, whatever their lower end."""
    return lambda x, sigma, until=None: gaussian_denoiser(std)(x, sigma)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(Euler(clip=False), 1), (Heun(clip=False), 2), (DPM(clip=False), 2)],
    ids=["euler", "heun", "dpm"],
)
def test_order_of_convergence_on_the_exact_gaussian_denoiser(sampler, order):
    """For data from N(0, s^2) the flow ends at x_T s / sqrt(s^2 + sigma_max^2). Errors in double precision."""
    with jax.enable_x64(True):
        start = jnp.ones((1, 1, 1, 1), jnp.float64) / 200
        exact = 80 / 200 * 0.5 / np.sqrt(0.25 + 80**2)
        errors = []
        for steps in (40, 80, 160, 320):
            levels = jnp.asarray(
                [*SCHEDULE.sigma(np.arange(steps) * (N - 1) / steps, N), SCHEDULE.sigma_min], jnp.float64
            )
            # from sigma_max to sigma_min, both sides of an exactly known flow
            target = exact * np.sqrt((0.25 + 0.002**2) / 0.25)
            end = sampler(gaussian_denoiser(), levels, lambda index: start)
            errors.append(abs(float(end[0, 0, 0, 0]) - target))
        rates = -np.diff(np.log2(errors))
    assert rates.min() > order - 0.2
    assert rates.max() < order + 0.4


@pytest.mark.parametrize("schedule", [VPSchedule(), VESchedule(), VPSchedule.between(0.002, 80)])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_in_the_time_of_vp_and_ve(schedule, solver, order):
    """Up to the lowest level, from which one more step leads to the data, the flow is that of dx/dsigma."""
    sampler = ScoreSDE(clip=False, schedule=schedule, solver=solver)
    with jax.enable_x64(True):
        start = jnp.ones((1, 1, 1, 1), jnp.float64) / 200
        errors = []
        for steps in (80, 160, 320):
            levels = jnp.asarray(np.geomspace(20, 0.5, steps + 1))
            end = sampler(gaussian_denoiser(), levels, lambda index: start)
            exact = 20 / 200 * np.sqrt((0.25 + 0.5**2) / (0.25 + 20**2))
            errors.append(abs(float(end[0, 0, 0, 0]) - exact))
        rates = -np.diff(np.log2(errors))
    assert rates.min() > order - 0.2
    assert rates.max() < order + 0.4


def test_vp_schedule_reaches_the_levels_given():
    schedule = VPSchedule.between(0.002, 80.0)
    np.testing.assert_allclose(schedule.levels(2), [80.0, 0.002], rtol=1e-6)
    np.testing.assert_allclose(VPSchedule.between(*VPSchedule().levels(2)[::-1]).beta_d, 19.9, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma(schedule.time(jnp.array([0.01, 1.0, 40.0]))), [0.01, 1, 40], rtol=1e-4)


@pytest.mark.parametrize("spacing", [None, "time", "flow_time", "log_snr"])
def test_segments_of_the_exact_flow_end_where_the_flow_ends(spacing):
    """For N(0, d^2) the flow from s to r multiplies x by sqrt((d^2 + r^2) / (d^2 + s^2))."""

    def exact(x, sigma, until):
        ratio = jnp.sqrt((0.25 + until**2) / (0.25 + sigma**2))
        return x * (1 - sigma * (ratio - 1) / (until - sigma))[:, None, None, None]

    sampler, noise = Segments(clip=False, spacing=spacing), jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    for steps in (1, 2, 5):
        levels = choose_levels(sampler, SCHEDULE, N, steps=steps)
        assert len(levels) == steps + 1
        images = walk(sampler, levels, lambda index: noise, exact)
        np.testing.assert_allclose(images, 80 * noise * 0.5 / np.sqrt(0.25 + 80**2), rtol=1e-4)


def test_a_function_with_its_boundary_at_zero_gets_the_whole_noise_of_the_next_level():
    levels = choose_levels(Consistency(), SCHEDULE, N, steps=2, boundary=0.0, tuned_sigmas=[(80.0, 0.5)])
    image = walk(
        Consistency(), levels, lambda index: jnp.ones((1, 2, 2, 3)), lambda x, sigma: jnp.where(sigma[0] < 1, x, 0 * x)
    )
    np.testing.assert_array_equal(image, 0.5)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (Consistency(), 5),
        (Euler(), 5),
        (Ancestral(), 5),
        (ProgressiveEuler(), 5),
        (Heun(), 9),
        (DPM(), 10),
        (Heun(churn=Churn(10)), 9),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_calls_of_the_network_in_five_steps(sampler, calls):
    denoiser, made = counted(gaussian_denoiser())
    levels = choose_levels(sampler, SCHEDULE, N, steps=5)
    walk(sampler, levels, lambda index: jnp.ones((1, 2, 2, 3)), denoiser).block_until_ready()
    jax.effects_barrier()
    assert len(made) == calls
    assert len(levels) == 6


def test_one_step_is_one_call_at_sigma_max():
    denoiser, made = counted(gaussian_denoiser())
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    image = walk(Consistency(), choose_levels(Consistency(), SCHEDULE, N, steps=1), lambda index: noise, denoiser)
    jax.effects_barrier()
    assert len(made) == 1
    np.testing.assert_allclose(image, gaussian_denoiser()(80 * noise, jnp.full(2, 80.0)), rtol=1e-6)


def test_the_last_step_of_the_consistency_sampler_adds_no_noise():
    """With f = 0 every image is only the last noise added, whose standard deviation must be exactly 0."""
    levels = choose_levels(Consistency(), SCHEDULE, N, timesteps=(22, 0))
    image = walk(Consistency(), levels, lambda index: jnp.ones((1, 2, 2, 3)), lambda x, sigma: 0 * x)
    assert not image.any()


def test_a_perfect_consistency_function_gives_the_data_law_in_one_step_and_in_five():
    """f(x, s) = x sqrt((d^2 + e^2) / (d^2 + s^2)) is exact for N(0, d^2): the images have standard deviation d."""
    std = 0.2

    def exact(x, sigma):
        scale = jnp.sqrt((std**2 + 0.002**2) / (std**2 + sigma**2))
        return x * scale[:, None, None, None]

    for steps in (1, 5):
        keys = jax.random.split(jax.random.key(0), 8)
        images = walk(
            Consistency(clip=False),
            choose_levels(Consistency(), SCHEDULE, N, steps=steps),
            lambda index, keys=keys: jax.random.normal(keys[index], (4, 64, 64, 3)),
            exact,
        )
        assert images.std() == pytest.approx(std, rel=0.02)


def test_without_churn_there_is_no_new_noise():
    def forbidden(index):
        assert isinstance(index, int), "noise inside the loop"
        return jnp.ones((1, 2, 2, 3))

    for sampler in (Heun(), DPM(), Euler(), ProgressiveEuler()):
        walk(sampler, choose_levels(sampler, SCHEDULE, N, steps=3), forbidden)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_lie_in_range_and_one_step_works(name):
    for steps in (1, 2, 7):
        levels = choose_levels(SAMPLERS[name], SCHEDULE, N, steps=steps)
        images = walk(SAMPLERS[name], levels, lambda index: jnp.full((1, 2, 2, 3), 3.0), whole_way(3.0))
        assert jnp.isfinite(images).all()
        assert jnp.abs(images).max() <= 1


def test_timesteps_indices_and_sigmas_agree():
    """22,0 in diffusers is 0,22,39 in OpenAI's code, and the noise levels 80, 1.38237."""
    by_timesteps = choose_levels(Consistency(), SCHEDULE, N, timesteps=(22, 0))
    assert by_timesteps == choose_levels(Consistency(), SCHEDULE, N, indices=(0, 22, 39))
    by_sigmas = choose_levels(Consistency(), SCHEDULE, N, sigmas=(80.0, 1.3823679566485092))
    np.testing.assert_allclose(by_timesteps, by_sigmas, rtol=1e-12)
    assert by_timesteps == choose_levels(Consistency(), SCHEDULE, N, steps=2, tuned=[(22, 0)])


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_consistency_sampler_uses_tuned_levels(name):
    plain = choose_levels(SAMPLERS[name], SCHEDULE, N, steps=2)
    for tuned in ({"tuned": [(22, 0)]}, {"tuned_sigmas": [(80.0, 0.821)]}):
        assert (choose_levels(SAMPLERS[name], SCHEDULE, N, steps=2, **tuned) != plain) == (name == "consistency")


@pytest.mark.parametrize(("steps", "indices"), [(1, [0]), (2, [0, 20]), (3, [0, 13, 26]), (4, [0, 10, 20, 30])])
def test_plain_steps_are_spaced_as_in_diffusers(steps, indices):
    levels = choose_levels(Consistency(), SCHEDULE, N, steps=steps)
    np.testing.assert_allclose(levels[:-1], SCHEDULE.sigma(np.array(indices), N), rtol=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "got none"),
        ({"steps": 1, "timesteps": (0,)}, "steps and timesteps"),
        ({"steps": 0}, "from 1 to 10000"),
        ({"timesteps": ()}, "an empty list"),
        ({"timesteps": (0, 22)}, "must descend"),
        ({"timesteps": (22, 10)}, "must descend to 0"),
        ({"timesteps": (40, 0)}, "0 to 39"),
        ({"indices": (22, 0)}, "must ascend"),
        ({"indices": (0, 22)}, "end with 39"),
        ({"indices": (-1, 39)}, "0 to 39"),
        ({"sigmas": (80.0, -1.0)}, "greater than 0.002"),
        ({"sigmas": (1.0, 80.0)}, "must descend"),
        ({"sigmas": (float("nan"),)}, "finite"),
        ({"sigmas": (1e39,)}, "finite"),
        ({"sigmas": (80.0, 0.00200000001)}, "greater than 0.002"),
    ],
)
def test_impossible_levels_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        choose_levels(Consistency(), SCHEDULE, N, **asked)
