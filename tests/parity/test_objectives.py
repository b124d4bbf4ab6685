"""Parity of losses per image and of gradient norms with OpenAI's code, from the same noise level indices and noise."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.unet_format import OPENAI
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, Constant, ConstantTargetEMA, Halving, Progressive
from cm_jax.diffusion.losses import SNR, Absolute, Karras, SNRPlusOne, Squared, TruncatedSNR, Uniform
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.objectives import ConsistencyDistillation, ConsistencyTraining, Denoising, ProgressiveDistillation
from cm_jax.objectives.distances import Resized
from cm_jax.types import leaves, per_image
from tests.support import DATA, adm_golden, nhwc

LOSS_BOUND = 1e-5
"""Maximum relative error of the loss of each image."""
GRADIENT_BOUND = 1e-4
"""Maximum relative error of the gradient norm of each parameter, after a float32 forward and backward pass."""
ROUNDING = 1e-6
"""Gradient norms below this fraction of the largest one are rounding errors.

They belong to the biases of six convolutions before a norm with one channel per group: their exact gradient is zero.
"""
LOSSES = sorted(path.stem for path in (DATA / "losses").glob("loss_*_*.npz"))
WEIGHTINGS = {
    "uniform": Uniform(),
    "snr": SNR(),
    "snr+1": SNRPlusOne(),
    "truncated-snr": TruncatedSNR(),
    "karras": Karras(),
}
DISTANCES = {"l1": Absolute(), "l2": Squared(), "l2-32": Resized(Squared(), 32)}
SCHEDULE = KarrasSchedule()


@dataclasses.dataclass(frozen=True)
class Switch(Uniform, Squared):
    """Selects one of several functions by a traced index, so that each kind of loss compiles once."""

    number: jax.Array
    choices: tuple

    def __call__(self, x, y, *rest):
        branches = [lambda x, y, choice=choice: choice(x, y, *rest) for choice in self.choices]
        return jax.lax.switch(self.number, branches, x, y)


@functools.cache
def loss_params(name):
    """Parameters of the target or teacher of the recorded losses."""
    network, _, _ = adm_golden("class_cond")
    source = read(DATA / "losses" / f"loss_{name}.pt", CheckpointHints(16, None, "edm", 18, 16))
    return network.prepare(source.params)


@functools.partial(jax.jit, static_argnums=0)
def losses_and_gradients(kind, params, images, labels, noise, index_or_sigma, levels, weighting, distance):
    """Losses of a batch, and gradient norms of their mean. `index_or_sigma`: sigma for "edm", else indices."""
    network, _, _ = adm_golden("class_cond")
    edm, consistency = (
        ConsistencyFunction(network, EDMPreconditioning()),
        ConsistencyFunction(network, ConsistencyPreconditioning()),
    )
    components = {
        "weighting": Switch(weighting, tuple(WEIGHTINGS.values())),
        "distance": Switch(distance, tuple(DISTANCES.values())),
    }

    def losses(student_params):
        target = consistency.denoiser(params["target"], labels)
        teacher = edm.denoiser(params["teacher"], labels)
        if kind == "edm":
            return Denoising(**components).losses(edm.denoiser(student_params, labels), images, index_or_sigma, noise)
        if kind == "progdist":
            t, middle, r = (SCHEDULE.sigma(index_or_sigma + ahead, levels + 1) for ahead in (0, 0.5, 1))
            student = edm.denoiser(student_params, labels)
            objective = ProgressiveDistillation(**components)
            return objective.losses(student, teacher, images, t, middle, r, noise)
        student = consistency.denoiser(student_params, labels)
        t, r = SCHEDULE.sigma(index_or_sigma, levels), SCHEDULE.sigma(index_or_sigma + 1, levels)
        if kind == "cd":
            objective = ConsistencyDistillation(**components)
            return objective.losses(student, target, images, t, r, noise, teacher=teacher)
        return ConsistencyTraining(**components).losses(student, target, images, t, r, noise)

    def mean_loss(student_params):
        each = losses(student_params)
        return each.mean(), each

    gradients, each = jax.grad(mean_loss, has_aux=True)(params["student"])
    return each, jax.tree.map(lambda gradient: jnp.linalg.norm(gradient.ravel()), gradients)


def computed_and_recorded(name):
    """(computed, recorded) losses, and (computed, recorded) gradient norms by OpenAI's parameter names."""
    with np.load(DATA / "losses" / f"{name}.npz") as recorded:
        golden = dict(recorded)
    network, student, _ = adm_golden(str(golden["model"]).removeprefix("adm_"))
    parts = name.split("_")
    kind, distance, weighting = parts[1], "l2" if parts[1] == "edm" else parts[2], parts[-1]
    losses, gradients = losses_and_gradients(
        kind,
        {"student": student, "target": loss_params("target"), "teacher": loss_params("teacher")},
        jnp.asarray(nhwc(golden["images"])),
        jnp.asarray(golden["y"], jnp.int32),
        jnp.asarray(nhwc(golden["noise"])),
        jnp.asarray(golden["sigmas"] if kind == "edm" else golden["indices"].astype(np.int32)),
        jnp.asarray(golden.get("num_scales", 0), jnp.int32),
        list(WEIGHTINGS).index(weighting),
        list(DISTANCES).index(distance),
    )
    flat = dict(leaves(gradients))
    names = {rule.path: rule.sources[0] for rule in OPENAI.rules(network)}
    norms = {names[path]: (float(value), float(golden[f"grad_norm/{names[path]}"])) for path, value in flat.items()}
    assert len(norms) == sum(key.startswith("grad_norm/") for key in golden)
    return (np.asarray(losses), golden["loss"]), norms


@pytest.mark.parametrize("name", LOSSES)
def test_recorded_losses_and_gradients(name):
    (losses, expected), norms = computed_and_recorded(name)
    np.testing.assert_allclose(losses, expected, rtol=LOSS_BOUND)
    largest = max(recorded for _, recorded in norms.values())
    rounding = {key for key, (_, recorded) in norms.items() if recorded < ROUNDING * largest}
    assert len(rounding) == 6
    assert all(key.endswith(("in_layers.2.bias", "out_layers.3.bias", "skip_connection.bias")) for key in rounding)
    for key, (norm, recorded) in norms.items():
        bound = ROUNDING * largest if key in rounding else GRADIENT_BOUND * recorded
        assert norm == pytest.approx(recorded, abs=bound), key


def test_all_losses_are_recorded():
    assert len(LOSSES) == 23
    kinds = {(name.split("_")[1], *name.split("_")[2:]) for name in LOSSES}
    weighted = {"karras", "snr", "snr+1", "truncated-snr", "uniform"}
    for kind in ("cd", "ct", "progdist"):
        assert {weighting for k, *rest, weighting in kinds if k == kind and rest == ["l2"]} == weighted


def _pattern(shape, a, m):
    return nhwc((2 * (a * np.arange(np.prod(shape)) % m / m - 0.5)).reshape(shape)).astype(np.float32)


def _linear(preconditioning, a, b):
    """The network F(x, t) = a x + b t with preconditioning."""

    def denoiser(x, sigma):
        raw = a * per_image(preconditioning.c_in(sigma)) * x + b * per_image(preconditioning.c_noise(sigma))
        return preconditioning.blend(x, sigma, raw, SCHEDULE.sigma_min)

    return denoiser


TOY_STUDENT, TOY_TARGET = (
    _linear(ConsistencyPreconditioning(), 0.3, 0.001),
    _linear(ConsistencyPreconditioning(), 0.29, 0.0011),
)
TOY_TEACHER, TOY_EDM_STUDENT = _linear(EDMPreconditioning(), 0.31, 0.0009), _linear(EDMPreconditioning(), 0.3, 0.001)
TOY_IMAGES, TOY_NOISE = _pattern((4, 3, 8, 8), 43, 83), np.float32(1.7) * _pattern((4, 3, 8, 8), 29, 79)
TOY_INDEX = np.array([0, 3, 6, 8])


@pytest.mark.parametrize(
    ("distance", "weighting", "distilled", "trained"),
    [
        ("l1", "uniform", ".03172162 .08876929 .1701299 .003146403", ".03245269 .09337041 .2236766 .02159422"),
        (
            "l2",
            "uniform",
            ".001010065 .009030108 .04306607 1.020933e-05",
            ".001059007 .009754591 .07495788 .0007028498",
        ),
        ("l2", "karras", ".004040417 .03621595 .3672392 .02448828", ".004236192 .03912154 .6391916 1.685869"),
        ("l2", "snr", "1.578227e-07 9.551564e-05 .1949749 .02444744", "1.654698e-07 .0001031788 .3393601 1.683057"),
        ("l2", "snr+1", ".001010223 .009125624 .238041 .02445765", ".001059172 .009857769 .414318 1.68376"),
        ("l2", "truncated-snr", ".001010065 .009030108 .1949749 .02444744", ".001059007 .009754591 .3393601 1.683057"),
        (
            "l2-32",
            "uniform",
            ".00100819 .008486892 .02633006 1.002497e-05",
            ".001056054 .009243502 .0347844 .0005232242",
        ),
    ],
)
def test_consistency_losses_of_a_linear_network(distance, weighting, distilled, trained):
    """Values of OpenAI's code. l2-32 resizes these images from 8 to 32 pixels."""
    components = {"distance": DISTANCES[distance], "weighting": WEIGHTINGS[weighting]}
    t, r = (jnp.asarray(SCHEDULE.sigma(TOY_INDEX + ahead, 10), jnp.float32) for ahead in (0, 1))
    images, noise = jnp.asarray(TOY_IMAGES), jnp.asarray(TOY_NOISE)
    losses = ConsistencyDistillation(**components).losses(
        TOY_STUDENT, TOY_TARGET, images, t, r, noise, teacher=TOY_TEACHER
    )
    np.testing.assert_allclose(losses, np.array(distilled.split(), float), rtol=LOSS_BOUND)
    losses = ConsistencyTraining(**components).losses(TOY_STUDENT, TOY_TARGET, images, t, r, noise)
    np.testing.assert_allclose(losses, np.array(trained.split(), float), rtol=LOSS_BOUND)


def test_progressive_distillation_loss_of_a_linear_network():
    t, middle, r = (jnp.asarray(SCHEDULE.sigma(TOY_INDEX + ahead, 11), jnp.float32) for ahead in (0, 0.5, 1))
    objective = ProgressiveDistillation(weighting=Uniform())
    losses = objective.losses(
        TOY_EDM_STUDENT, TOY_TEACHER, jnp.asarray(TOY_IMAGES), t, middle, r, jnp.asarray(TOY_NOISE)
    )
    np.testing.assert_allclose(losses, [0.005358106, 0.003192394, 0.006171048, 1.735797e-05], rtol=LOSS_BOUND)


@pytest.mark.parametrize(
    ("weighting", "recorded"),
    [
        (Karras(), [1.441142, 1.221003, 1.366463, 2.022909]),
        (Uniform(), [0.01385713, 0.1526254, 0.3215208, 0.5054114]),
    ],
)
def test_denoising_loss_of_a_linear_network(weighting, recorded):
    sigma = jnp.array([0.1, 0.5, 2, 20])
    losses = Denoising(weighting=weighting).losses(
        TOY_EDM_STUDENT, jnp.asarray(TOY_IMAGES), sigma, jnp.asarray(TOY_NOISE)
    )
    np.testing.assert_allclose(losses, recorded, rtol=LOSS_BOUND)


@pytest.mark.parametrize(
    ("name", "target_ema", "curriculum"),
    [
        ("fixed_fixed_40_40_600000", ConstantTargetEMA(0.95), Constant(40)),
        (
            "adaptive_progressive_2_200_800000",
            AdaptiveTargetEMA(),
            Progressive(2, 200, 800_000),
        ),
        (
            "adaptive_progressive_2_150_1000000",
            AdaptiveTargetEMA(),
            Progressive(2, 150, 1_000_000),
        ),
        ("fixed_progressive_2_200_800000", ConstantTargetEMA(0.95), Progressive(2, 200, 800_000)),
        ("fixed_progdist_64_1_600000", ConstantTargetEMA(1.0), Halving(64, 50_000)),
    ],
)
def test_recorded_schedules(name, target_ema, curriculum):
    recorded = json.loads((DATA / "losses" / "schedules.json").read_text())[name]
    steps, decays, levels = map(np.array, zip(*recorded, strict=True))
    np.testing.assert_array_equal(jax.vmap(curriculum)(jnp.asarray(steps)), levels)
    np.testing.assert_allclose(
        jax.vmap(lambda step: target_ema(step, curriculum))(jnp.asarray(steps)), decays, rtol=1.5e-7
    )
