"""The training step: microbatches, skipped steps, target, EMAs, new teachers, precision, and loading of batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, Constant, ConstantTargetEMA, Halving, Progressive
from cm_jax.diffusion.losses import PseudoHuber
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, EDM2UNet
from cm_jax.objectives import (
    AdaptiveWeight,
    Batch,
    ConsistencyDistillation,
    ConsistencyTraining,
    Denoising,
    FrozenParams,
    Models,
    ProgressiveDistillation,
)
from cm_jax.parallelism import OneDevice, Pmap, Sharded
from cm_jax.training.ema import ConstantEMA, PowerEMA
from cm_jax.training.optimizers import Adam, ConstantRate, RAdam
from cm_jax.training.step import Constants, StepBatch, TrainingStep, image_keys, load_batch
from cm_jax.types import leaves
from tests.toy import ToyNetwork

TOY = ToyNetwork()
UNET = ADMUNet(
    image_size=8,
    base_channels=32,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    head_dim=16,
    classes=3,
    dropout=0.1,
)
KEY = jax.random.key(5)


def distilling(network, **changes):
    models = Models(
        ConsistencyFunction(network, ConsistencyPreconditioning()), ConsistencyFunction(network, EDMPreconditioning())
    )
    step = TrainingStep(
        ConsistencyDistillation(Constant(6)),
        models,
        RAdam(ConstantRate(1e-2)),
        (ConstantEMA(0.9), PowerEMA(0.1)),
        ConstantTargetEMA(0.8),
    )
    return dataclasses.replace(step, **changes)


def raw_batches(network, steps, size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (steps, size, *network.image_shape), dtype=np.uint8)
    return StepBatch(images, rng.integers(0, 3, (steps, size)).astype(np.int32))


def run(step, network, across, batches, dispatches=None):
    """(state, metrics) on the host after all batches, in `dispatches` calls, by default one a step.

    A program of several steps takes as many times longer to compile.
    """
    dispatches = dispatches or len(batches.images)
    params = network.initialize(jax.random.key(1))
    teacher = network.initialize(jax.random.key(2))
    state = across.place_state(step.initial_state(params, teacher))
    constants = across.place_constants(Constants(teacher=None if step.objective.replaces_teacher else teacher))
    program = across.compile(functools.partial(step.run_steps, across), state)
    metrics = []
    for part in zip(*(np.split(a, dispatches) for a in batches if a is not None), strict=True):
        state, found = program(state, constants, across.place_batches(StepBatch(*part)), KEY)
        metrics.append(jax.device_get(found))
    return jax.device_get(state), {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}


def farthest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.float64(x) - y).max()), a, b)))


def test_steps_of_one_call_are_the_steps_of_many():
    batches = raw_batches(TOY, 8, 4)
    one, _ = run(distilling(TOY), TOY, OneDevice(), batches)
    other, _ = run(distilling(TOY), TOY, OneDevice(), batches, dispatches=4)
    assert farthest(one, other) < 1e-6
    assert one.batches == other.batches == 8


@pytest.mark.parametrize("across", [OneDevice(), Sharded(2)], ids=str)
def test_microbatches_are_averaged(across):
    """Accumulating over 4 parts is the step of the whole batch: same images, same keys, mean gradient."""
    batches = raw_batches(TOY, 3, 16)
    whole, metrics = run(distilling(TOY), TOY, OneDevice(), batches)
    parts, of_parts = run(distilling(TOY, grad_accum_steps=4), TOY, across, batches)
    for name in ("loss", "gradient_norm", "loss_sigma", "sigma"):
        np.testing.assert_allclose(of_parts[name], metrics[name], rtol=1e-5)
    assert farthest(whole, parts) < 1e-5


@dataclasses.dataclass(frozen=True)
class Poisoned(Denoising):
    """Not finite where the batch has an image of class 2."""

    def __call__(self, models, params, frozen, batch, keys, step):
        losses, metrics = super().__call__(models, params, frozen, batch, keys, step)
        return jnp.where(batch.labels == 2, jnp.nan, 1.0) * losses, metrics


@pytest.mark.parametrize("across", [OneDevice(), Pmap(2), Sharded(2)], ids=str)
def test_a_step_that_is_not_finite_is_skipped_and_counted(across):
    step = distilling(TOY, objective=Poisoned(), optimizer=Adam())
    good = raw_batches(TOY, 2, 4)._replace(labels=np.zeros((2, 4), np.int32))
    bad = good._replace(labels=np.asarray([[0, 0, 0, 0], [0, 0, 0, 2]], np.int32))
    before, _ = run(step, TOY, across, StepBatch(good.images[:1], good.labels[:1]))
    after, metrics = run(step, TOY, across, bad)
    assert (after.batches, after.skipped, after.consecutive_skips) == (2, 1, 1)
    counters = ("batches", "skipped", "consecutive_skips")
    for name in set(after._fields) - set(counters) - {"target", "teacher"}:
        assert farthest(getattr(after, name), getattr(before, name)) < 1e-6, name
    np.testing.assert_array_equal(metrics["skipped"], [0, 1])
    assert not np.isfinite(metrics["loss"][1])


def test_skipped_steps_in_a_row_are_counted_from_the_last_good_one():
    labels = np.asarray([[2], [2], [0], [2]], np.int32)
    batches = StepBatch(raw_batches(TOY, 4, 1).images, labels)
    step = distilling(TOY, objective=Poisoned())
    _, metrics = run(step, TOY, OneDevice(), batches)
    np.testing.assert_array_equal(metrics["consecutive_skips"], [1, 2, 0, 1])
    np.testing.assert_array_equal(metrics["skipped"], [1, 2, 2, 3])


def test_target_and_averages_follow_the_new_parameters():
    """One step from equal trees: each is (1 - rate) of the way to the new parameters, at the rate of k = 0."""
    step = distilling(TOY)
    start = TOY.initialize(jax.random.key(1))
    after, _ = run(step, TOY, OneDevice(), raw_batches(TOY, 1, 4))
    move = jax.tree.map(lambda new, old: new - old, after.params, start)
    for tree, rate in (
        (after.target, 0.8),
        (after.ema["exponential_0.9"], 0.9),
        (after.ema["power_0.1"], 0.0),
    ):
        update = jax.tree.map(lambda a, s: a - s, tree, start)
        expected = jax.tree.map(lambda m, share=1 - rate: share * m, move)
        assert farthest(update, expected) < 1e-7
    assert farthest(move, jax.tree.map(np.zeros_like, move)) > 1e-4


def test_a_target_without_a_rate_is_the_student():
    """mu = 0 is no target of its own."""
    batches = raw_batches(TOY, 5, 4)
    none, without = run(distilling(TOY, target_ema=None), TOY, OneDevice(), batches)
    zero, with_rate = run(distilling(TOY, target_ema=ConstantTargetEMA(0.0)), TOY, OneDevice(), batches)
    np.testing.assert_allclose(without["loss"], with_rate["loss"], rtol=1e-5)
    assert none.target is None
    assert farthest(none.params, zero.params) < 1e-6


def test_the_teacher_is_replaced_when_the_curriculum_moves_on(optimized):
    step = distilling(TOY, objective=ProgressiveDistillation(Halving(8, steps_per_stage=3)), target_ema=None)
    step = dataclasses.replace(step, models=Models(step.models.teacher, step.models.teacher))
    batches = raw_batches(TOY, 4, 4)
    first = TOY.initialize(jax.random.key(2))
    early, _ = run(step, TOY, OneDevice(), StepBatch(batches.images[:2], batches.labels[:2]))
    assert farthest(early.teacher, first) == 0
    over, _ = run(step, TOY, OneDevice(), StepBatch(batches.images[:3], batches.labels[:3]))
    assert farthest(over.teacher, over.params) == 0
    assert farthest(over.ema["exponential_0.9"], over.params) == 0
    assert farthest(over.optimizer, jax.tree.map(np.zeros_like, over.optimizer)) == 0
    later, _ = run(step, TOY, OneDevice(), batches)
    assert farthest(later.teacher, over.params) == 0
    assert farthest(later.params, over.params) > 0
    within_a_call, _ = run(step, TOY, OneDevice(), batches, dispatches=2)
    assert farthest(within_a_call.teacher, over.params) < 1e-6


def test_a_curriculum_compiles_once():
    """N(k) from 2 to 9 and mu(k) with it, every stage visited."""
    traced = []

    class Counting(ConsistencyTraining):
        def __call__(self, *arguments):
            traced.append(1)
            return super().__call__(*arguments)

    curriculum = Progressive(2, 8, steps=40)
    step = distilling(TOY, objective=Counting(curriculum), target_ema=AdaptiveTargetEMA())
    _, metrics = run(step, TOY, OneDevice(), raw_batches(TOY, 44, 2))
    assert set(metrics["levels"]) == set(range(2, 10))
    assert len(traced) == 1


def test_masters_stay_float32_and_half_precision_stays_near(each_implementation):
    """The gradient with bfloat16 products: 3 % of the float32 one's norm at most, here."""
    batches = raw_batches(UNET, 1, 4)

    def gradient(network, **changes):
        step = distilling(
            network,
            objective=Denoising(),
            optimizer=RAdam(ConstantRate(1.0), beta1=0.0),
            emas=(ConstantEMA(0.9),),
            target_ema=None,
            **changes,
        )  # its first step: -gradient
        state, _ = run(step, UNET, OneDevice(), batches)
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {np.dtype("float32")}
        start = UNET.initialize(jax.random.key(1))
        return jax.tree.map(lambda new, old: new - old, state.params, start)

    def norm(tree):
        return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))

    exact = gradient(UNET)
    half = gradient(dataclasses.replace(UNET, precision="bfloat16"))
    assert norm(jax.tree.map(np.subtract, half, exact)) < 0.03 * norm(exact)
    again = gradient(dataclasses.replace(UNET, rematerialize=True))
    assert norm(jax.tree.map(np.subtract, again, exact)) < 1e-5 * norm(exact)


def test_images_are_mirrored_or_not_each_by_its_own_key():
    raw = raw_batches(TOY, 1, 64)
    images = jnp.asarray(raw.images[0])
    keys = image_keys(KEY, 3, jnp.arange(64))
    plain = load_batch(StepBatch(images), Constants(), None).images
    np.testing.assert_allclose(plain, np.asarray(images) / 127.5 - 1, atol=1e-7)
    assert (float(plain.min()), float(plain.max())) == (-1, 1)
    mixed = load_batch(StepBatch(images), Constants(), keys).images
    same = np.asarray([(mixed[i] == plain[i]).all() for i in range(64)])
    mirrored = np.asarray([(mixed[i] == plain[i, :, ::-1]).all() for i in range(64)])
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48
    other = load_batch(StepBatch(images[32:]), Constants(), keys[32:]).images
    np.testing.assert_array_equal(other, mixed[32:])


def test_numbers_fetch_from_a_set_on_the_devices():
    raw = raw_batches(TOY, 1, 6)
    images, labels = jnp.asarray(raw.images[0]), jnp.asarray(raw.labels[0])
    indices = jnp.asarray([4, 0, 4])
    found = load_batch(StepBatch(indices=indices), Constants(images=images, labels=labels), None)
    wanted = load_batch(StepBatch(images[indices], labels[indices]), Constants(), None)
    np.testing.assert_array_equal(found.images, wanted.images)
    np.testing.assert_array_equal(found.labels, wanted.labels)


def test_the_state_before_is_used_up():
    step, across = distilling(TOY), OneDevice()
    params = TOY.initialize(jax.random.key(1))
    state = across.place_state(step.initial_state(params))
    constants = across.place_constants(Constants(teacher=params))
    program = across.compile(functools.partial(step.run_steps, across), state)
    program(state, constants, across.place_batches(raw_batches(TOY, 1, 2)), KEY)
    assert state.params["mlp"]["in"].is_deleted()
    assert not params["mlp"]["in"].is_deleted()  # what it was made of belongs to the caller


def test_pseudo_huber_pairs_train_too():
    objective = ConsistencyTraining(Constant(6), distance=PseudoHuber())
    _, metrics = run(distilling(TOY, objective=objective, target_ema=None), TOY, OneDevice(), raw_batches(TOY, 3, 4))
    assert np.isfinite(metrics["loss"]).all()


EDM2 = EDM2UNet(
    image_size=8,
    base_channels=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_factors=(),
    head_dim=16,
    classes=3,
)


def test_edm2_kernels_are_normalized_before_each_gradient():
    """With a learning rate of zero, a step returns the parameters at which it takes the gradient."""
    start = jax.tree.map(lambda leaf: 3 * np.asarray(leaf) + np.float32(0.1), EDM2.initialize(jax.random.key(1)))
    models = Models(ConsistencyFunction(EDM2, EDMPreconditioning()))
    step = TrainingStep(Denoising(uncertainty=True), models, Adam(ConstantRate(1e-30)))
    across, batches = OneDevice(), raw_batches(EDM2, 1, 2)
    state = across.place_state(step.initial_state(start))
    program = across.compile(functools.partial(step.run_steps, across), state)
    after, metrics = program(state, Constants(), across.place_batches(batches), KEY)
    for path, leaf in leaves(after.params):
        if path.endswith("/kernel"):
            rms = np.sqrt(np.square(leaf).mean(tuple(range(leaf.ndim - 1))))
            np.testing.assert_allclose(rms, 1, rtol=2e-4, err_msg=path)
    assert np.isfinite(metrics["loss"]).all()
    assert float(metrics["gradient_norm"][0]) > 0


def test_normalizing_edm2_kernels_keeps_the_function():
    params = jax.tree.map(lambda leaf: 3 * leaf + 0.1, EDM2.initialize(jax.random.key(1)))
    x, labels = jax.random.normal(KEY, (2, 8, 8, 3)), jnp.arange(2)
    predict = jax.jit(EDM2.predict)
    before, after = (predict(each, x, jnp.ones(2), labels) for each in (params, EDM2.constrain(params)))
    assert float(jnp.abs(before).max()) > 0.01
    np.testing.assert_allclose(after, before, atol=1e-3 * float(jnp.abs(before).max()))
    assert UNET.constrain(params) is params


def test_the_uncertainty_weights_the_loss_of_a_denoiser():
    """e^-u loss + u, for networks with an uncertainty head and without another learned weight."""
    function = ConsistencyFunction(EDM2, EDMPreconditioning())
    params, batch = EDM2.initialize(jax.random.key(1)), Batch(jnp.ones((2, 8, 8, 3)), jnp.arange(2))
    keys = jax.random.split(KEY, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(objective, params):
        return objective(Models(function), params, FrozenParams(), batch, keys, jnp.int32(0))

    plain, metrics = evaluate(Denoising(), params)
    weighted, _ = evaluate(Denoising(uncertainty=True), params)
    u = EDM2.log_variance(params, EDMPreconditioning().c_noise(metrics["sigma"]))
    np.testing.assert_allclose(weighted, np.exp(-u) * plain + u, rtol=1e-5)
    assert float(jnp.abs(u).max()) > 0.01
    for objective, network in (
        (Denoising(uncertainty=True), UNET),
        (Denoising(uncertainty=True, adaptive=AdaptiveWeight()), EDM2),
    ):
        with pytest.raises(InputError, match="uncertainty"):
            objective.check(Models(ConsistencyFunction(network, EDMPreconditioning())))
