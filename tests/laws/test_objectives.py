"""Properties of the objectives: exact solutions have no loss, derivatives are exact, images are independent."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Constant, Halving, Progressive, ShrinkingGap
from cm_jax.diffusion.losses import InverseGap, PseudoHuber, Squared, Uniform
from cm_jax.diffusion.noise_distributions import CappedInterval, SortedInterval
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    MeanFlowPreconditioning,
    Preconditioning,
    TrigFlowPreconditioning,
)
from cm_jax.errors import InputError
from cm_jax.objectives import (
    AdaptiveWeight,
    Batch,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    Denoising,
    EasyConsistencyTuning,
    EulerStep,
    FrozenParams,
    HeunStep,
    ImprovedConsistencyTraining,
    MeanFlow,
    Models,
    ProgressiveDistillation,
)
from cm_jax.objectives.base import Resized
from cm_jax.objectives.continuous_time import trigflow_field
from cm_jax.types import Network, per_image, split_keys
from tests.support import SMALL, gaussian_denoiser, random_params, relative

SCHEDULE = KarrasSchedule()
SHAPE = (6, 4, 4, 3)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A smooth network of two layers with classes and dropout."""

    dropout: float = 0.0
    image_shape: tuple[int, int, int] = SHAPE[1:]
    classes: int | None = 5
    interval_embedding: bool = False
    attention: str = "plain"

    def predict(self, params, x, c_noise, labels=None, dropout_keys=None, length=None):
        assert set(params) == set(self.shapes())
        if length is not None:
            c_noise = 300 * c_noise + 200 * length
        clock = jnp.stack([jnp.sin(c_noise / 300), jnp.cos(c_noise / 300), c_noise / 1000], axis=-1)
        hidden = jnp.tanh(x @ params["mix"] + (clock @ params["clock"] + params["table"][labels])[:, None, None])
        if dropout_keys is not None and self.dropout:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, hidden.shape[1:]))(dropout_keys)
            hidden = jnp.where(kept, hidden / (1 - self.dropout), 0)
        return hidden @ params["out"]

    def shapes(self):
        return {"mix": (3, 8), "clock": (3, 8), "table": (5, 8), "out": (8, 3)}

    def initialize(self, key):
        keys = jax.random.split(key, 4)
        return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, self.shapes().items(), strict=True)}

    def check_input(self, shape, labeled): ...

    def prepare(self, params):
        return params

    def at_precision(self, precision):
        return self


EDM = ConsistencyFunction(Tiny(), EDMPreconditioning())
BOUNDARY = ConsistencyFunction(Tiny(), ConsistencyPreconditioning())
TRIGFLOW = ConsistencyFunction(Tiny(), TrigFlowPreconditioning(time_factor=300.0))
FLOW = ConsistencyFunction(Tiny(interval_embedding=True), MeanFlowPreconditioning())
OBJECTIVES = {
    "denoising": Denoising(),
    "cd": ConsistencyDistillation(),
    "cd, euler": ConsistencyDistillation(solver=EulerStep(), curriculum=Constant(18)),
    "ct": ConsistencyTraining(),
    "ict": ImprovedConsistencyTraining(),
    "ect": EasyConsistencyTuning(),
    "progressive": ProgressiveDistillation(Halving(64, 100)),
    "sct": ContinuousTraining(),
    "scd": ContinuousDistillation(adaptive=AdaptiveWeight(16)),
    "meanflow": MeanFlow(),
    "meanflow, capped": MeanFlow(CappedInterval(), power=0.75, epsilon=1e-3),
}
FUNCTIONS = {
    "denoising": Models(EDM),
    "cd": Models(BOUNDARY, EDM),
    "cd, euler": Models(BOUNDARY, EDM),
    "ct": Models(BOUNDARY),
    "ict": Models(BOUNDARY),
    "ect": Models(EDM),
    "progressive": Models(EDM, EDM),
    "sct": Models(TRIGFLOW),
    "scd": Models(EDM, EDM),
    "meanflow": Models(FLOW),
    "meanflow, capped": Models(FLOW),
}
PARAMS, OTHER = (Tiny().initialize(jax.random.key(seed)) for seed in (1, 2))
HELPERS = FrozenParams(target=OTHER, teacher=Tiny().initialize(jax.random.key(3)))
KEYS = jax.random.split(jax.random.key(4), SHAPE[0])
BATCH = Batch(jax.random.uniform(jax.random.key(5), SHAPE, minval=-1), jnp.arange(SHAPE[0]) % 5)
NOISE = jax.random.normal(jax.random.key(6), SHAPE)
LATE = 150_000
"""A step at which ECT's pairs are apart from r = 0."""


def everything(objective, params: Any = PARAMS):
    """The parameters that an objective trains, each random."""
    extras = objective.extras()
    return params | jax.tree.map(lambda leaf: leaf + 0.1, extras)


def test_the_tiny_network_is_a_network():
    assert isinstance(Tiny(), Network)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_images_are_independent(name):
    """Losses and metrics of an image do not depend on its neighbors, so devices do not matter."""
    objective = OBJECTIVES[name]
    whole = objective(FUNCTIONS[name], everything(objective), HELPERS, BATCH, KEYS, LATE)
    order = jnp.array([4, 1])
    part = Batch(BATCH.images[order], BATCH.labels[order])
    alone = objective(FUNCTIONS[name], everything(objective), HELPERS, part, KEYS[order], LATE)
    assert whole[0].shape == (SHAPE[0],)
    assert jnp.isfinite(whole[0]).all()
    assert len(np.unique(whole[0])) == SHAPE[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[order], rtol=1e-4, atol=1e-6), tuple(alone), tuple(whole))


def test_level_noise_and_dropout_of_every_image_have_keys_of_their_own():
    split = split_keys(KEYS)
    numbers = jnp.concatenate([jax.random.key_data(keys) for keys in (*split, KEYS)])
    assert len(np.unique(numbers, axis=0)) == 4 * SHAPE[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_student_is_trained_and_all_of_it(name):
    objective = OBJECTIVES[name]

    def mean_loss(params, frozen):
        return objective(FUNCTIONS[name], params, frozen, BATCH, KEYS, LATE)[0].mean()

    ours, theirs = jax.grad(mean_loss, argnums=(0, 1))(everything(objective), HELPERS)
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(ours))
    assert not any(leaf.any() for leaf in jax.tree.leaves(theirs))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_objective_says_it_uses_is_what_it_uses(name):
    objective = OBJECTIVES[name]

    def losses(frozen):
        return objective(FUNCTIONS[name], everything(objective), frozen, BATCH, KEYS, LATE)[0]

    with_target = losses(HELPERS)
    assert np.array_equal(losses(HELPERS._replace(target=None)), with_target) != objective.has_target
    np.testing.assert_array_equal(losses(HELPERS._replace(target=PARAMS)), losses(HELPERS._replace(target=None)))
    if objective.has_teacher:
        assert not np.array_equal(losses(HELPERS._replace(teacher=OTHER)), with_target)
        with pytest.raises(InputError, match="needs a teacher"):
            losses(FrozenParams())
        with pytest.raises(InputError, match="needs a teacher"):
            objective.check(dataclasses.replace(FUNCTIONS[name], teacher=None))
    else:
        np.testing.assert_array_equal(losses(HELPERS._replace(teacher=None)), with_target)


STAGES = {
    "ct": range(0, 810_000, 10_000),
    "ict": range(0, 450_000, 50_000),
    "ect": range(0, 225_000, 25_000),
    "progressive": range(0, 900, 100),
    "sct": range(0, 12_000, 1_000),
    "scd": range(0, 12_000, 1_000),
}
"""Steps in every stage of the curricula that have some, and beyond the last."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_curriculum_compiles_once(name):
    objective, models = OBJECTIVES[name], FUNCTIONS[name]
    params = everything(objective)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def compiled(objective, models, step):
        return objective(models, params, HELPERS, BATCH, KEYS, step)[0]

    equal = dataclasses.replace(objective), dataclasses.replace(models)
    seen = {float(compiled(*equal, step).sum()) for step in STAGES.get(name, (0, 1, 800_000))}
    compiled(objective, models, 0)
    assert (len(seen) > 5) == (name in STAGES)
    assert compiled._cache_size() == 1


def test_consistency_training_at_3_18_and_151_levels_compiles_once():
    objective = dataclasses.replace(OBJECTIVES["ct"], curriculum=Progressive(2, 150, 800_000))
    compiled = jax.jit(lambda step: objective(FUNCTIONS["ct"], PARAMS, HELPERS, BATCH, KEYS, step))
    for step, levels in ((1, 3), (11_000, 18), (800_000, 151)):
        losses, metrics = compiled(step)
        fixed = dataclasses.replace(objective, curriculum=Constant(levels))
        np.testing.assert_array_equal(metrics["levels"], levels)
        np.testing.assert_allclose(losses, fixed(FUNCTIONS["ct"], PARAMS, HELPERS, BATCH, KEYS, 0)[0], rtol=1e-4)
    assert compiled._cache_size() == 1


@dataclasses.dataclass(frozen=True)
class OnlyRaw(Preconditioning):
    """f is the raw network, whatever the level."""

    sigma_data: float = 0.5

    def c_skip(self, sigma, sigma_min):
        return jnp.zeros_like(sigma)

    def c_out(self, sigma, sigma_min):
        return jnp.ones_like(sigma)

    def c_in(self, sigma):
        return jnp.zeros_like(sigma)

    def c_noise(self, sigma):
        return jnp.zeros_like(sigma)


@pytest.mark.parametrize("kind", [ConsistencyTraining, EasyConsistencyTuning, ConsistencyDistillation])
def test_a_pair_shares_its_dropout(kind):
    """The outputs depend on neither image nor noise level, so only the dropout mask could differ."""
    models = Models(ConsistencyFunction(Tiny(dropout=0.5), OnlyRaw()), EDM)
    losses, metrics = kind()(models, PARAMS, HELPERS._replace(target=None), BATCH, KEYS, LATE)
    assert (metrics.get("ratio", jnp.ones(1)) > 0).all()
    np.testing.assert_array_equal(losses, np.zeros(SHAPE[0]))
    other, _ = kind()(models, PARAMS, HELPERS, BATCH, KEYS, LATE)
    assert (other > 0).all()


@pytest.mark.parametrize("name", ["ct", "ict", "ect", "cd", "cd, euler"])
def test_a_pair_of_equal_levels_has_no_loss(name):
    """Same image, same noise, same mask: exactly zero."""
    objective = dataclasses.replace(OBJECTIVES[name], weighting=Uniform())  # iCT's and ECT's own is 1 / 0 there
    t = jnp.array([0.01, 0.1, 0.5, 1.0, 9.0, 80.0])
    function = ConsistencyFunction(Tiny(dropout=0.5), FUNCTIONS[name].student.preconditioning)
    student = function.denoiser(PARAMS, BATCH.labels, KEYS)
    other = function.denoiser(PARAMS, BATCH.labels, KEYS[::-1])
    pair = functools.partial(objective.losses, teacher=gaussian_denoiser() if objective.has_teacher else None)
    np.testing.assert_array_equal(pair(student, student, BATCH.images, t, t, NOISE), np.zeros(SHAPE[0]))
    assert (pair(student, other, BATCH.images, t, t, NOISE) > 0).all()


def one_image(sigma_min):
    """The exact f for a data set of one image: along the flow, x - image shrinks as sigma does, down to sigma_min."""
    return lambda x, sigma: BATCH.images + (x - BATCH.images) * per_image(sigma_min / sigma)


@pytest.mark.parametrize("levels", [3, 18, 151])
def test_a_data_set_of_one_image_has_no_consistency_training_loss(levels):
    index = jnp.linspace(0, levels - 2, SHAPE[0]).astype(jnp.int32)
    t, r = SCHEDULE.sigma(index, levels), SCHEDULE.sigma(index + 1, levels)
    objective, exact = OBJECTIVES["ct"], one_image(0.002)
    np.testing.assert_allclose(objective.losses(exact, exact, BATCH.images, t, r, NOISE), 0, atol=1e-12)
    wrong = objective.losses(exact, one_image(0.1), BATCH.images, t, r, NOISE)
    assert (wrong > 1e-4).all()


def test_a_data_set_of_one_image_has_no_loss_for_its_denoiser():
    exact = one_image(0.0)
    t = jnp.array([0.01, 0.1, 0.5, 1.0, 9.0, 80.0])
    r = ShrinkingGap()(t, 0)
    assert (r == 0).any()
    assert (r > 0).any()
    ect = OBJECTIVES["ect"].losses(exact, exact, BATCH.images, t, r, NOISE)
    denoising = OBJECTIVES["denoising"].losses(exact, BATCH.images, t, NOISE)
    progressive = OBJECTIVES["progressive"].losses(exact, exact, BATCH.images, t, 0.7 * t, 0.5 * t, NOISE)
    np.testing.assert_allclose(ect * t, 0, atol=1e-6)
    np.testing.assert_allclose(denoising, 0, atol=1e-12)
    np.testing.assert_allclose(progressive, 0, atol=1e-6)


def test_where_r_is_zero_tuning_is_denoising():
    """w d(D(x + t z, t), x): the target is the image itself, whatever the target network says of it."""
    objective, t = OBJECTIVES["ect"], jnp.full(SHAPE[0], 0.3)
    student = EDM.denoiser(PARAMS, BATCH.labels)
    tuning = objective.losses(student, lambda x, sigma: jnp.nan * x, BATCH.images, t, 0 * t, NOISE)
    denoising = Denoising(weighting=InverseGap(), distance=PseudoHuber(0.0))
    np.testing.assert_allclose(tuning, denoising.losses(student, BATCH.images, t, NOISE), rtol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [(EulerStep(), 2), (HeunStep(), 3)])
def test_the_exact_gaussian_function_has_a_distillation_loss_of_the_solvers_order(solver, order):
    """A solver of order p errs by h^(p + 1) in one step; distances are norms, in double precision."""

    def exact(x, sigma):
        return x * per_image(jnp.sqrt((0.25 + 0.002**2) / (0.25 + sigma**2)))

    with jax.enable_x64(True):
        objective = ConsistencyDistillation(solver=solver, distance=PseudoHuber(0.0))
        images, noise = jnp.asarray(BATCH.images, jnp.float64), jnp.asarray(NOISE, jnp.float64)
        losses = []
        for levels in (81, 161, 321, 641):
            index = jnp.full(SHAPE[0], (levels - 1) // 2)
            t, r = (SCHEDULE.sigma(jnp.asarray(i, jnp.float64), levels) for i in (index, index + 1))
            losses.append(
                float(objective.losses(exact, exact, images, t, r, noise, teacher=gaussian_denoiser()).mean())
            )
        rates = -np.diff(np.log2(losses))
    assert losses[-1] < 2e-3
    np.testing.assert_allclose(rates, order, atol=0.15)


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


def test_the_continuous_loss_steps_along_the_normalised_tangent():
    """Its gradient by F is -2 / d g / (|g| + c)."""
    t, x, velocity = jnp.asarray(TIMES, jnp.float32), 0.5 * NOISE, BATCH.images
    _, tangent = SCT.tangent(smooth, x, t, velocity, 1.0)
    norm = jnp.sqrt(jnp.square(tangent).mean((1, 2, 3)))

    def loss(shift):
        return SCT.losses(lambda u, t: smooth(u, t) + shift, x, t, velocity, 1.0)[0].sum()

    expected = -2 / NOISE[0].size * tangent / per_image(norm + 0.1)
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_objective_can_learn_a_weight(name):
    """e^w loss - w is minimal at e^-w = loss, changes nothing initially, and is not part of the network."""
    plain = dataclasses.replace(OBJECTIVES[name], adaptive=None)
    learning = dataclasses.replace(plain, adaptive=AdaptiveWeight(16))
    extras = learning.extras()
    assert plain.extras() == {}
    assert set(extras) == {AdaptiveWeight.NAME}
    assert AdaptiveWeight.NAME not in SMALL.shapes()
    everywhere = HELPERS._replace(target=OTHER | extras, teacher=HELPERS.teacher | extras)
    losses, _ = plain(FUNCTIONS[name], PARAMS, HELPERS, BATCH, KEYS, LATE)
    fresh, _ = learning(FUNCTIONS[name], PARAMS | extras, everywhere, BATCH, KEYS, LATE)
    np.testing.assert_array_equal(fresh, losses)

    def weighted(bias):
        branch = {AdaptiveWeight.NAME: extras[AdaptiveWeight.NAME] | {"bias": bias}}
        return learning(FUNCTIONS[name], PARAMS | branch, HELPERS, BATCH, KEYS, LATE)[0]

    np.testing.assert_allclose(weighted(2.0), np.exp(2) * losses - 2, rtol=1e-5)
    assert jax.grad(lambda bias: weighted(bias).mean())(-jnp.log(losses.mean())) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: ContinuousTraining(regularizer=0.0), "positive regularizer"),
        (lambda: MeanFlow(epsilon=0.0), "epsilon > 0"),
    ],
)
def test_impossible_objectives_are_refused(make, wanted):
    with pytest.raises(InputError, match=wanted):
        make()


def edm(network):
    return ConsistencyFunction(network, EDMPreconditioning())


@pytest.mark.parametrize(
    ("objective", "models", "wanted"),
    [
        (ContinuousTraining(), Models(BOUNDARY), "ConsistencyPreconditioning"),
        (ContinuousTraining(), Models(edm(SMALL)), 'attention="plain"'),
        (ContinuousDistillation(), Models(EDM, BOUNDARY), "ConsistencyPreconditioning.* for student and teacher"),
        (ContinuousDistillation(), Models(EDM, ConsistencyFunction(Tiny(), EDMPreconditioning(0.2))), "sigma_data"),
        (ConsistencyDistillation(), Models(BOUNDARY, edm(Tiny(classes=3))), "same images and classes"),
        (ProgressiveDistillation(), Models(EDM, edm(Tiny(image_shape=(8, 8, 3)))), "same images and classes"),
        (MeanFlow(), Models(EDM), "needs MeanFlowPreconditioning"),
    ],
)
def test_functions_that_an_objective_cannot_train_are_refused(objective, models, wanted):
    with pytest.raises(InputError, match=wanted):
        objective.check(models)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_defaults_and_accepts_what_it_can_train(name):
    assert hash(type(OBJECTIVES[name])()) == hash(type(OBJECTIVES[name])())
    OBJECTIVES[name].check(FUNCTIONS[name])


@dataclasses.dataclass(frozen=True)
class Weighed(Squared):
    """A distance with weights of its own."""

    weight: Any = None

    def __call__(self, x, y):
        return self.weight * Squared()(x, y)

    def with_weights(self, params):
        return Weighed(params["weight"])


@pytest.mark.parametrize("name", ["denoising", "cd", "ct", "ect", "progressive"])
@pytest.mark.parametrize("distance", [Weighed(), Resized(Weighed(), 4)])
def test_the_weights_of_a_distance_come_with_the_helpers(name, distance):
    def losses(distance, perceptual):
        objective = dataclasses.replace(OBJECTIVES[name], distance=distance)
        return objective(FUNCTIONS[name], PARAMS, HELPERS._replace(perceptual=perceptual), BATCH, KEYS, LATE)[0]

    np.testing.assert_allclose(losses(distance, {"weight": 3.0}), 3 * losses(Squared(), None), rtol=1e-6)
