"""sCM and MeanFlow: tangents and targets are exact derivatives, and exact solutions have no loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_distributions import SortedInterval
from cm_jax.diffusion.preconditioning import EDMPreconditioning, TrigFlowPreconditioning
from cm_jax.objectives import MeanFlow
from cm_jax.objectives.continuous_time import trigflow_field
from cm_jax.types import per_image
from tests.support import SMALL, random_params, relative
from tests.tiny import BATCH, KEYS, NOISE, OBJECTIVES, PARAMS, SHAPE, Tiny

SCT = OBJECTIVES["sct"]
TIMES = np.array([0.02, 0.3, 0.7, 1.1, 1.4, 1.55])


def smooth(u, t):
    """A field with every kind of dependence, exact in double precision."""
    return jnp.sin(2 * u + per_image(3 * t)) + jnp.roll(u, 1, axis=1) * per_image(jnp.cos(t)) + u**2


def doubles(*arrays):
    return tuple(jnp.asarray(np.asarray(array), jnp.float64) for array in arrays)


def test_the_tangent_is_the_derivative_of_f_along_the_flow():
    """g = cos t df/dt for f = cos t x - sin t s F, by central differences in double precision."""
    with jax.enable_x64(True):
        t, x, velocity = doubles(TIMES, 0.5 * NOISE, BATCH.images)

        def f(step):
            x_there, there = x + step * velocity, t + step
            return per_image(jnp.cos(there)) * x_there - per_image(jnp.sin(there)) * 0.5 * smooth(x_there / 0.5, there)

        prediction, tangent = SCT.tangent(smooth, x, t, velocity, 1.0)
        numerical = per_image(jnp.cos(t)) * (f(1e-5) - f(-1e-5)) / 2e-5
        assert relative(tangent, numerical) < 1e-8
        np.testing.assert_array_equal(prediction, smooth(x / 0.5, t))
        halfway, cold = (SCT.tangent(smooth, x, t, velocity, warmth)[1] for warmth in (0.5, 0.0))
        np.testing.assert_allclose(halfway, (tangent + cold) / 2, atol=1e-12)
        diffusion = per_image(jnp.cos(t) ** 2) * (velocity - 0.5 * smooth(x / 0.5, t))
        np.testing.assert_allclose(cold, diffusion, atol=1e-12)


@pytest.mark.parametrize("std", [0.2, 0.5])
def test_the_exact_gaussian_function_has_no_tangent(std):
    """Data from N(0, d^2): x_t moves as sqrt(d^2 cos^2 t + s^2 sin^2 t), and f(x_t, t) = x_0."""
    with jax.enable_x64(True):
        t, x = doubles(TIMES, NOISE)

        def spread(t):
            return jnp.sqrt((std * jnp.cos(t)) ** 2 + (0.5 * jnp.sin(t)) ** 2)

        def field(u, t):
            return per_image((jnp.cos(t) - std / spread(t)) / jnp.sin(t)) * u

        velocity = x * per_image((0.25 - std**2) * jnp.sin(t) * jnp.cos(t) / spread(t) ** 2)
        _, tangent = SCT.tangent(field, x, t, velocity, 1.0)
        np.testing.assert_allclose(tangent, 0, atol=1e-12)
        _, wrong = SCT.tangent(field, x, t, 1.1 * velocity + 0.1, 1.0)
        assert jnp.abs(wrong).max() > 1e-3


@pytest.mark.parametrize("tangent_limit", ["norm", "clip"])
def test_the_continuous_loss_steps_along_the_limited_tangent(tangent_limit):
    """Its gradient by F is -2 / d g / (|g| + c), or -2 / d g with every value limited to [-1, 1]."""
    objective = dataclasses.replace(SCT, tangent_limit=tangent_limit)
    t, x, velocity = jnp.asarray(TIMES, jnp.float32), 0.5 * NOISE, BATCH.images
    _, tangent = SCT.tangent(smooth, x, t, velocity, 1.0)
    norm = jnp.sqrt(jnp.square(tangent).mean((1, 2, 3)))

    def loss(shift):
        return objective.losses(lambda u, t: smooth(u, t) + shift, x, t, velocity, 1.0)[0].sum()

    inside, outside = jnp.abs(tangent) < 1, jnp.abs(tangent) > 1
    assert inside.any()
    assert outside.any()
    limited = (
        jnp.where(outside, jnp.sign(tangent), tangent) if tangent_limit == "clip" else tangent / per_image(norm + 0.1)
    )
    expected = -2 / NOISE[0].size * limited
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(SHAPE)), expected, rtol=1e-4, atol=1e-6)


def test_training_and_distillation_agree_on_one_image():
    """With one image the teacher knows it, so that its velocity is that of training: v_t."""
    noise, t = 0.5 * NOISE, jnp.asarray(TIMES[1:], jnp.float32)
    t = jnp.concatenate([t, t[:1]])
    x_t = per_image(jnp.cos(t)) * BATCH.images + per_image(jnp.sin(t)) * noise
    exact = (per_image(jnp.cos(t)) * x_t - BATCH.images) / per_image(0.5 * jnp.sin(t))
    np.testing.assert_allclose(0.5 * exact, SCT.velocity(None, BATCH.images, noise, x_t, t, 0.5), atol=2e-5)


@pytest.mark.parametrize("preconditioning", [EDMPreconditioning(), TrigFlowPreconditioning(time_factor=300.0)])
def test_trigflow_sees_the_same_function_as_sigma_does(preconditioning):
    """cos t x_t - sin t s F(x_t / s, t) = f(x_t / cos t, s tan t): samplers need not know."""
    function = ConsistencyFunction(Tiny(), preconditioning)
    t = jnp.asarray(TIMES, jnp.float32)
    field = trigflow_field(function, PARAMS, BATCH.labels)
    ours = per_image(jnp.cos(t)) * NOISE - per_image(jnp.sin(t)) * 0.5 * field(NOISE / 0.5, t)
    theirs = function(PARAMS, NOISE / per_image(jnp.cos(t)), 0.5 * jnp.tan(t), BATCH.labels)
    assert relative(ours, theirs) < 1e-6


def test_forward_derivatives_of_the_adm_network():
    """Its derivative along a direction against central differences, as far as single precision shows them."""
    network = dataclasses.replace(SMALL, channel_mult=(1,), attention_factors=(), attention="plain")
    params = random_params(network)
    x, direction = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 3))
    t, labels = jnp.array([0.3, 1.2]), jnp.array([1, 7])
    field = jax.jit(
        trigflow_field(ConsistencyFunction(network, TrigFlowPreconditioning(time_factor=20.0)), params, labels)
    )
    _, derivative = jax.jvp(field, (x, t), (direction, jnp.ones(2)))
    numerical = (field(x + 5e-3 * direction, t + 5e-3) - field(x - 5e-3 * direction, t - 5e-3)) / 1e-2
    assert relative(derivative, numerical) < 5e-3


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_the_mean_flow_target_is_v_minus_length_times_the_derivative(power):
    def u(z, t, length):
        return smooth(z, t) * per_image(1 + length**2) + per_image(jnp.sin(t * length))

    with jax.enable_x64(True):
        images, noise, t = doubles(BATCH.images, NOISE, np.linspace(0.1, 1, SHAPE[0]))
        r = jnp.asarray([0.6, 1.0, 0.0, 0.3, 0.9, 0.5]) * t

        def along(step):
            there = t + step
            return u(per_image(1 - there) * images + per_image(there) * noise, there, there - r)

        derivative = (along(1e-5) - along(-1e-5)) / 2e-5
        goal = (noise - images) - per_image(t - r) * derivative
        errors = jnp.square(along(0.0) - goal).sum((1, 2, 3))
        objective = MeanFlow(power=power)
        np.testing.assert_allclose(objective.errors(u, images, t, r, noise), errors, rtol=1e-7)
        np.testing.assert_allclose(
            objective.losses(u, images, t, r, noise), errors / (errors + 0.01) ** power, rtol=1e-7
        )


def test_the_mean_flow_target_is_held_fixed():
    """The error's gradient by u is 2 (u - target): nothing flows through the derivative, though u moves it."""
    t = jnp.linspace(0.2, 1, SHAPE[0])

    def errors(shift):
        def u(z, t, length):
            return smooth(z, t) + shift * per_image(t)

        return OBJECTIVES["meanflow"].errors(u, BATCH.images, t, 0.5 * t, NOISE)

    by_shift = jax.grad(lambda shift: errors(shift).sum())(jnp.zeros(SHAPE))
    np.testing.assert_allclose(jnp.square(by_shift / per_image(2 * t)).sum((1, 2, 3)), errors(0.0), rtol=1e-4)


def test_the_exact_mean_velocity_of_one_image_has_no_loss():
    """Every path runs straight to the image, so that its mean velocity is (z - x) / t over any interval."""
    t, r = SortedInterval(flow_matching_ratio=0.3)(KEYS)

    def exact(z, t, length):
        return (z - BATCH.images) / per_image(t)

    np.testing.assert_allclose(OBJECTIVES["meanflow"].errors(exact, BATCH.images, t, r, NOISE), 0, atol=1e-8)
    longer = OBJECTIVES["meanflow"].errors(lambda z, t, length: exact(z, t, length) + 0.1, BATCH.images, t, r, NOISE)
    assert (longer > 0.1).all()


def test_where_r_is_t_mean_flow_is_flow_matching():
    t = jnp.linspace(0.1, 0.9, SHAPE[0])
    z = per_image(1 - t) * BATCH.images + per_image(t) * NOISE
    errors = OBJECTIVES["meanflow"].errors(lambda z, t, length: smooth(z, t), BATCH.images, t, t, NOISE)
    np.testing.assert_allclose(errors, jnp.square(smooth(z, t) - NOISE + BATCH.images).sum((1, 2, 3)), rtol=1e-5)
