"""Optimizers compared with PyTorch, and EMAs with their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm_jax.errors import InputError
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import ConstantEMA, PowerEMA, decay_for_half_life, ema_update
from cm_jax.training.optimizers import (
    Adam,
    AdamW,
    ConstantRate,
    CosineDecay,
    InverseRootDecay,
    LinearDecay,
    RAdam,
    variance_length,
)
from tests.support import DATA


def walk(optimizer, start, gradients):
    """Parameters after every step."""
    transformation = optimizer.transformation()

    @jax.jit
    def step(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, path = {"w": jnp.asarray(start)}, []
    state = transformation.init(params)
    for gradient in gradients:
        params, state = step(params, state, {"w": jnp.asarray(gradient)})
        path.append(np.asarray(params["w"]))
    return np.array(path)


def test_radam_takes_the_recorded_path_of_pytorch():
    with np.load(DATA / "training" / "radam.npz") as golden:
        path = walk(RAdam(ConstantRate(float(golden["lr"]))), golden["path"][0], golden["grads"])
        np.testing.assert_allclose(path, golden["path"][1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 10, 100, 499, 500, 501, 2_000, 10_000, 1_000_000])
@pytest.mark.parametrize("beta2", [0.999, 0.99, 0.95])
def test_radam_counts_what_its_variance_has_seen_without_cancellation(step, beta2):
    power = beta2**step
    exact = 2 / (1 - beta2) - 1 - 2 * step * power / (1 - power)
    assert float(variance_length(jnp.int32(step), beta2)) == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RAdam(ConstantRate(0.01), weight_decay=0.1), lambda it, w: it.optim.RAdam(w, lr=0.01, weight_decay=0.1)),
        (RAdam(ConstantRate(0.01), beta1=0.5, beta2=0.9), lambda it, w: it.optim.RAdam(w, lr=0.01, betas=(0.5, 0.9))),
        (Adam(ConstantRate(0.01), beta2=0.99), lambda it, w: it.optim.Adam(w, lr=0.01, betas=(0.9, 0.99))),
        (AdamW(ConstantRate(0.01), weight_decay=0.1), lambda it, w: it.optim.AdamW(w, lr=0.01, weight_decay=0.1)),
    ],
    ids=["radam-decay", "radam-betas", "adam", "adamw"],
)
def test_optimizers_agree_with_pytorch(ours, theirs):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(30, 4, 3)).astype(np.float32)
    weight = torch.tensor(start, requires_grad=True)
    optimizer, path = theirs(torch, [weight]), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(weight.detach().numpy().copy())
    np.testing.assert_allclose(walk(ours, start, gradients), path, atol=2e-6, rtol=0)


def test_gradients_are_clipped_by_the_norm_over_all_parameters():
    gradients = {"a": jnp.full(3, 2.0), "b": jnp.full(1, 2.0)}  # norm 4
    transformation = RAdam(ConstantRate(1.0), beta1=0.0, clip_norm=1.0).transformation()
    updates, _ = transformation.update(gradients, transformation.init(gradients), gradients)
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)  # RAdam's first steps are the gradients


def test_learning_rates_rise_and_fall_as_they_say():
    def at(rate, *steps):
        return [float(rate.schedule()(step)) for step in steps]

    assert at(ConstantRate(2.0), 0, 10**6) == [2, 2]
    np.testing.assert_allclose(at(ConstantRate(2.0, warm_up=4), 0, 1, 2, 3, 4, 99), [0.5, 1, 1.5, 2, 2, 2])
    np.testing.assert_allclose(at(LinearDecay(2.0, warm_up=2, steps=10), 0, 1, 2, 7, 12, 99), [1, 2, 2, 1, 0, 0])
    np.testing.assert_allclose(at(CosineDecay(2.0, steps=10), 0, 5, 10, 11), [2, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(at(InverseRootDecay(2.0, steps=100), 0, 100, 400), [2, 2, 1])
    np.testing.assert_allclose(at(ConstantRate(2.0, warm_up=1), 0, 1), [2, 2])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ConstantRate(0.0),
        lambda: ConstantRate(1e-4, warm_up=-1),
        lambda: LinearDecay(steps=0),
        lambda: Adam(beta1=1.0),
        lambda: RAdam(beta2=1.0),
        lambda: Adam(epsilon=0.0),
        lambda: Adam(clip_norm=0.0),
        lambda: ConstantEMA(1.0),
        lambda: PowerEMA(0.3),
        lambda: PowerEMA(0.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()


def averaged(average, values):
    def step(carry, value):
        tree, k = carry
        return (ema_update(tree, {"w": value}, average.weight_at(k)), k + 1), None

    (tree, _), _ = jax.lax.scan(step, ({"w": jnp.float32(-100.0)}, 0), jnp.asarray(values, jnp.float32))
    return float(tree["w"])


def test_constant_ema_equals_its_weighted_sum():
    values, beta = np.arange(20.0), 0.8
    weights = (1 - beta) * beta ** np.arange(20)[::-1]
    assert averaged(ConstantEMA(beta), values) == pytest.approx(weights @ values - 100 * beta**20, rel=1e-5)


def test_half_a_life_is_forgotten_after_its_images():
    assert decay_for_half_life(50e6, 4096) == 0.9999432189950708  # as in OpenAI's implementation
    assert decay_for_half_life(1000, 10) ** 100 == pytest.approx(0.5)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25, 12**-0.5])
def test_power_ema_has_its_relative_width(width):
    """Its weights over the steps grow as i^gamma; their standard deviation over their number is the width."""
    steps = 4_000
    average = PowerEMA(width)
    positions = np.arange(1, steps + 1) / steps
    mean, square = averaged(average, positions), averaged(average, positions**2)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=0.01)
    assert mean == pytest.approx((average.gamma + 1) / (average.gamma + 2), rel=0.01)


def test_power_ema_forgets_its_initial_value():
    assert averaged(PowerEMA(0.1), [7.0]) == 7
    assert PowerEMA(12**-0.5).gamma == pytest.approx(0, abs=1e-6)  # an even average
    assert PowerEMA(0.05).gamma == pytest.approx(16.97, abs=0.01)  # as EDM2 states it
    assert PowerEMA(0.1).gamma == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("k", [10**4, 10**6, 10**8])
def test_weights_of_power_emas_are_exact_in_long_runs(k):
    exact = -math.expm1((PowerEMA(0.05).gamma + 1) * math.log1p(-1 / (k + 1)))
    assert float(jax.jit(PowerEMA(0.05).weight_at)(jnp.int32(k))) == pytest.approx(exact, rel=1e-6)


def test_a_weight_of_zero_changes_no_bit():
    old, new = {"w": jnp.asarray([0.1, 1e-30])}, {"w": jnp.asarray([3.3, 1e30])}
    np.testing.assert_array_equal(ema_update(old, new, 0.0)["w"], old["w"])


def test_averages_have_names_of_their_own():
    names = [average.name for average in TrainConfig(ema_decay=(0.999, 0.9999432189950708), power_ema=(0.05, 0.1)).emas]
    assert names == ["exponential_0.999", "exponential_0.9999432189950708", "power_0.05", "power_0.1"]
