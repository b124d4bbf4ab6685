"""Training with guidance: label dropout, guided teachers, and students that take the strength as an input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import edm_names
from cm_jax.conversion.unet_format import OPENAI
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.guidance import FixedGuidance, UniformGuidance, guided
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.networks import EDM2UNet
from cm_jax.objectives import ConsistencyDistillation, ContinuousDistillation, Denoising, Models
from cm_jax.objectives.continuous_time import trigflow_field
from cm_jax.parallelism import OneDevice, Pmap, Sharded
from cm_jax.training.config import TrainConfig
from cm_jax.training.optimizers import Adam, ConstantRate
from cm_jax.training.step import Constants, StepBatch, TrainingStep, drop_labels, image_keys
from cm_jax.types import leaves, per_image, split_keys
from tests import tiny
from tests.laws.test_interval_embedding import ADM, SONG
from tests.support import random_params
from tests.toy import ToyNetwork

PLAIN = dataclasses.replace(SONG, interval_embedding=False)
X = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
SIGMA = jnp.array([0.1, 1.0, 10.0])
LABELS = [0, 2, 1]
ONE = OneDevice()


# label dropout


def test_labels_are_dropped_at_the_given_rate():
    keys = image_keys(jax.random.key(3), 7, jnp.arange(10_000))
    labels = jnp.arange(10_000) % 3
    dropped = np.asarray(drop_labels(labels, keys, 0.1, ToyNetwork()))
    assert (dropped == 3).mean() == pytest.approx(0.1, abs=4 * (0.09 / 10_000) ** 0.5)
    np.testing.assert_array_equal(dropped[dropped != 3], labels[dropped != 3])
    np.testing.assert_array_equal(drop_labels(labels[50:60], keys[50:60], 0.1, ToyNetwork()), dropped[50:60])


PROGRAMS = {}


def trained(network, params, labels, across=ONE, label_dropout=0.0):
    """Parameters after three steps of denoising."""
    models = Models(ConsistencyFunction(network, EDMPreconditioning()))
    step = TrainingStep(Denoising(), models, Adam(ConstantRate(1e-2)), label_dropout=label_dropout)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, *network.image_shape), dtype=np.uint8)
    batches = StepBatch(images, None if labels is None else np.tile(labels, (3, 1)))
    state = across.place_state(step.initial_state(params))
    if (step, across) not in PROGRAMS:
        PROGRAMS[step, across] = across.compile(functools.partial(step.run_steps, across), state)
    state, _ = PROGRAMS[step, across](state, Constants(), across.place_batches(batches), jax.random.key(4))
    return jax.device_get(state.params)["mlp"]


TOY = ToyNetwork(dropout=0.0)
TOY_PARAMS = TOY.initialize(jax.random.key(1))
TOY_LABELS = (np.arange(8) % 3).astype(np.int32)


def test_label_dropout_1_trains_the_unconditional_model():
    found = trained(TOY, TOY_PARAMS, TOY_LABELS, label_dropout=1.0)
    unlabeled = {name: leaf for name, leaf in TOY_PARAMS["mlp"].items() if name != "table"}
    expected = trained(dataclasses.replace(TOY, classes=None), {"mlp": unlabeled}, None)
    np.testing.assert_array_equal(found.pop("table"), TOY_PARAMS["mlp"]["table"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)


def test_label_dropout_0_changes_nothing():
    jax.tree.map(
        np.testing.assert_array_equal,
        trained(TOY, TOY_PARAMS, TOY_LABELS, label_dropout=0.0),
        trained(TOY, TOY_PARAMS, TOY_LABELS),
    )


@pytest.mark.parametrize("across", [Pmap(4), Sharded(2)], ids=str)
def test_label_dropout_does_not_depend_on_devices(across):
    one = trained(TOY, TOY_PARAMS, TOY_LABELS, label_dropout=0.5)
    other = trained(TOY, TOY_PARAMS, TOY_LABELS, across, 0.5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other, one)
    plain = trained(TOY, TOY_PARAMS, TOY_LABELS)
    assert np.abs(plain["table"] - one["table"]).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_dropout": 1.5}, r"label_dropout in \[0, 1\], got 1.5"),
        ({"label_dropout": 0.1, "network": dataclasses.replace(PLAIN, classes=None)}, "class-conditional"),
    ],
)
def test_label_dropout_that_is_impossible_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)


# guided teachers


DISTILLATIONS = {"cd": ConsistencyDistillation(), "scd": ContinuousDistillation()}


def loss(name, objective):
    program = jax.jit(objective, static_argnums=0)
    return program(tiny.FUNCTIONS[name], tiny.PARAMS, tiny.HELPERS, tiny.BATCH, tiny.KEYS, tiny.LATE)[0]


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_a_teacher_with_guidance_1_is_the_teacher(name):
    plain, objective = DISTILLATIONS[name], dataclasses.replace(DISTILLATIONS[name], guidance=FixedGuidance(1.0))
    np.testing.assert_array_equal(loss(name, objective), loss(name, plain))
    guided_loss = loss(name, dataclasses.replace(plain, guidance=FixedGuidance(2.0)))
    assert np.abs(guided_loss / loss(name, plain) - 1).max() > 1e-3


NONE = jnp.full(tiny.SHAPE[0], 5)


def reference(x, sigma):
    """D_ref + 2.5 (D - D_ref) of the teacher by itself without labels."""
    params = tiny.HELPERS.teacher
    own, without = (tiny.EDM(params, x, sigma, labels) for labels in (tiny.BATCH.labels, NONE))
    return without + 2.5 * (own - without)


def test_consistency_distillation_follows_the_guided_teacher():
    objective = dataclasses.replace(DISTILLATIONS["cd"], guidance=FixedGuidance(2.5))
    key_level, key_noise, _ = split_keys(tiny.KEYS)
    t, r, _ = objective.sample_pair(key_level, tiny.SCHEDULE, tiny.LATE)
    noise = jax.vmap(lambda key: jax.random.normal(key, tiny.SHAPE[1:]))(key_noise)
    student, target = (tiny.BOUNDARY.denoiser(p, tiny.BATCH.labels) for p in (tiny.PARAMS, tiny.HELPERS.target))
    expected = objective.losses(student, target, tiny.BATCH.images, t, r, noise, teacher=reference)
    np.testing.assert_allclose(loss("cd", objective), expected, rtol=1e-4)


def test_continuous_distillation_follows_the_guided_teacher():
    """The guided F is that of the guided denoiser: D = cos t x_t - sin t sigma_data F."""
    t, x_t = jnp.array([0.1, 0.8, 1.5]), X[:, :4, :4]
    sigma, labels = 0.5 * jnp.tan(t), tiny.BATCH.labels[:3]
    field = functools.partial(trigflow_field, tiny.EDM, tiny.PARAMS)
    found = guided(field(labels), field(NONE[:3]), 2.5)(x_t / 0.5, t)
    denoisers = [tiny.EDM.denoiser(tiny.PARAMS, each) for each in (labels, NONE[:3])]
    estimate = guided(*denoisers, 2.5)(x_t / per_image(jnp.cos(t)), sigma)
    np.testing.assert_allclose(per_image(jnp.cos(t)) * x_t - per_image(0.5 * jnp.sin(t)) * found, estimate, atol=1e-5)


def test_strengths_are_uniform_and_belong_to_images():
    keys, guidance = jax.random.split(jax.random.key(0), 4000), UniformGuidance(1.5, 4.0)
    strengths = guidance(keys)
    assert 1.5 <= strengths.min() < 1.51
    assert 3.99 < strengths.max() <= 4.0
    assert strengths.mean() == pytest.approx(2.75, abs=0.05)
    np.testing.assert_array_equal(guidance(keys[7:9]), strengths[7:9])


@pytest.mark.parametrize(
    ("objective", "functions", "message"),
    [
        (ConsistencyDistillation(guidance=UniformGuidance()), tiny.FUNCTIONS["cd"], "guidance_embedding=True"),
        (
            ConsistencyDistillation(guidance=FixedGuidance()),
            Models(*(ConsistencyFunction(tiny.Tiny(guidance_embedding=True), EDMPreconditioning()) for _ in range(2))),
            "guidance_embedding=False",
        ),
        (
            ContinuousDistillation(guidance=FixedGuidance()),
            Models(*(ConsistencyFunction(tiny.Tiny(classes=None), EDMPreconditioning()) for _ in range(2))),
            "class-conditional teacher",
        ),
    ],
)
def test_guidance_that_does_not_fit_the_networks_is_refused(objective, functions, message):
    with pytest.raises(InputError, match=message):
        objective.check(functions)


@pytest.mark.parametrize(
    ("kind", "values"), [(FixedGuidance, (-1,)), (UniformGuidance, (3, 2)), (UniformGuidance, (-1,))]
)
def test_strengths_out_of_range_are_refused(kind, values):
    with pytest.raises(InputError, match="guidance"):
        kind(*values)


# students that take the strength as an input

EDM2 = EDM2UNet(image_size=8, base_channels=8, channel_mult=(1,), blocks_per_level=1, attention_factors=(), classes=3)
NETWORKS = {"adm": dataclasses.replace(ADM, interval_embedding=False), "song": PLAIN, "edm2": EDM2}
TOLD = {name: dataclasses.replace(network, guidance_embedding=True) for name, network in NETWORKS.items()}


@pytest.fixture(params=TOLD)
def told(request):
    return TOLD[request.param]


def test_the_guidance_embedding_is_one_more_parameter_and_starts_at_zero(told):
    """So a student that starts with its teacher's weights starts as its teacher, at every strength."""
    plain = dataclasses.replace(told, guidance_embedding=False)
    both, one = (dict(leaves(network.shapes())) for network in (told, plain))
    assert both.keys() - one.keys() == {"guidance/weight"}
    assert not told.initialize(jax.random.key(0))["guidance"]["weight"].any()
    params = random_params(plain)
    start = params | {"guidance": {"weight": jnp.zeros(both["guidance/weight"].shape)}}
    labels, time = jnp.asarray(LABELS), jnp.log(SIGMA)
    predict = jax.jit(told.predict)
    at_3 = predict(start, X, time, labels, guidance=jnp.full(3, 3.0))
    np.testing.assert_allclose(at_3, jax.jit(plain.predict)(params, X, time, labels), atol=1e-5)
    params = random_params(told)
    one = predict(params, X, time, labels, guidance=jnp.ones(3))
    np.testing.assert_array_equal(predict(params, X, time, labels), one)
    assert np.abs(predict(params, X, time, labels, guidance=jnp.full(3, 3.0)) - one).max() > 1e-3
    with pytest.raises(InputError, match="guidance_embedding=True"):
        plain.predict(random_params(plain), X, time, labels, guidance=jnp.ones(3))


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_students_learn_from_the_strength(name):
    network = TOLD["song"]
    objective = dataclasses.replace(DISTILLATIONS[name], guidance=UniformGuidance(1.0, 3.0))
    models = Models(*(ConsistencyFunction(each, EDMPreconditioning()) for each in (network, PLAIN)))
    objective.check(models)
    frozen = tiny.FrozenParams(teacher=random_params(PLAIN))
    batch = tiny.Batch(jnp.tanh(X), jnp.asarray(LABELS))
    keys = jax.random.split(jax.random.key(2), 3)
    gradient = jax.jit(jax.grad(lambda params: objective(models, params, frozen, batch, keys, tiny.LATE)[0].mean()))
    assert np.abs(gradient(random_params(network))["guidance"]["weight"]).max() > 0


STUDENT = Model(
    ModelConfig(TOLD["song"], ConsistencyPreconditioning(), guidance_range=(1.5, 3.0)), random_params(TOLD["song"])
)


def test_a_student_samples_at_a_strength_of_its_range():
    """By default at the nearest to 1."""
    low, high = (STUDENT.sample(0, 2, labels=1, guidance=strength) for strength in (1.5, 3.0))
    np.testing.assert_array_equal(STUDENT.sample(0, 2, labels=1), low)
    assert np.abs(low - high).max() > 1e-3
    with pytest.raises(InputError, match=r"guidance in \[1.5, 3\].*got 4"):
        STUDENT.sample(0, 2, labels=1, guidance=4)
    with pytest.raises(InputError, match="guidance alone"):
        STUDENT.sample(0, 2, labels=1, guidance=2, guide=STUDENT)
    assert ModelConfig.from_json(STUDENT.config.to_json(), "a test") == STUDENT.config


def test_third_party_formats_have_no_guidance_embedding():
    for rules, network in ((OPENAI.rules, TOLD["adm"]), (edm_names.rules, TOLD["song"])):
        with pytest.raises(InputError, match="no networks with a guidance embedding"):
            rules(network)
