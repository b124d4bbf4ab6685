"""Guided sampling: the formula, its interval, and models with their guides."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.guidance import GuidedDenoiser, guided
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.editing import Strokes
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.samplers import Churn, Heun, generation
from cm_jax.samplers.plan import guidance_text, sampler_text
from cm_jax.types import digest
from tests.laws.test_interval_embedding import SONG
from tests.support import SMALL, gaussian_denoiser, random_params

X = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
SIGMA = jnp.array([0.1, 1.0, 10.0])
SHARP, BLURRED = gaussian_denoiser(0.5), gaussian_denoiser(1.0)
PLAIN = dataclasses.replace(SONG, interval_embedding=False)
UNCONDITIONAL = dataclasses.replace(PLAIN, classes=None)


def model(network, seed=0, preconditioning=None, **settings):
    return Model(
        ModelConfig(network, preconditioning or EDMPreconditioning(), **settings), random_params(network, seed)
    )


TEACHER, GUIDE, PRIOR = model(PLAIN), model(PLAIN, 1), model(UNCONDITIONAL, 2)
LABELS = [0, 2, 1]


def samples(teacher=TEACHER, **options):
    return teacher.sample(0, 3, labels=LABELS, sampler=Heun(clip=False), steps=4, **options)


# the formula


@pytest.mark.parametrize("options", [{}, {"guide": GUIDE}, {"guide": PRIOR, "guidance_interval": (0.1, 5)}], ids=str)
def test_guidance_1_is_no_guidance(options):
    np.testing.assert_array_equal(samples(guidance=1.0, **options), samples())


def test_traced_guidance_1_is_no_guidance():
    denoise = jax.jit(lambda g: guided(SHARP, BLURRED, g)(X, SIGMA))
    np.testing.assert_array_equal(denoise(jnp.float32(1)), jax.jit(SHARP)(X, SIGMA))


def test_guidance_is_linear_in_the_strength():
    at = {g: guided(SHARP, BLURRED, g)(X, SIGMA) for g in (0.0, 1.0, 2.5)}
    np.testing.assert_allclose(at[0.0], BLURRED(X, SIGMA), atol=1e-6)
    np.testing.assert_allclose(at[2.5], at[0.0] + 2.5 * (at[1.0] - at[0.0]), atol=1e-6)


def test_each_image_has_its_own_strength():
    strengths = jnp.array([0.5, 1.0, 3.0])
    together = guided(SHARP, BLURRED, strengths)(X, SIGMA)
    for index, strength in enumerate(strengths):
        alone = guided(SHARP, BLURRED, strength)(X[index : index + 1], SIGMA[index : index + 1])
        np.testing.assert_allclose(together[index], alone[0], atol=1e-6)


def test_outside_of_the_interval_nothing_changes():
    found, strong = guided(SHARP, BLURRED, 3.0, 0.1, 1.0)(X, SIGMA), guided(SHARP, BLURRED, 3.0)(X, SIGMA)
    for index, inside in enumerate((False, True, False)):  # 0.1 < sigma <= 1
        np.testing.assert_array_equal(found[index], (strong if inside else SHARP(X, SIGMA))[index])


@pytest.mark.parametrize("interval", [(0.0, np.inf), (0.3, 3.0)], ids=str)
def test_guided_sampling_of_gaussians_has_a_closed_form(interval):
    """dx/dsigma = x sigma sum_i w_i / (s_i^2 + sigma^2): x is proportional to prod_i (s_i^2 + sigma^2)^(w_i / 2)."""
    strength, levels = 1.7, np.asarray([*KarrasSchedule(sigma_max=20.0).descending(400), 0.0])

    def scale(low, high, g):
        ratios = [((std**2 + low**2) / (std**2 + high**2)) ** (w / 2) for std, w in ((0.5, g), (1.0, 1 - g))]
        return ratios[0] * ratios[1]

    low, high = interval[0], min(interval[1], levels[0])
    expected = scale(0, low, 1) * scale(low, high, strength) * scale(high, levels[0], 1)
    start = 1e-3 * jax.random.normal(jax.random.key(1), (1, 2, 2, 3))
    denoiser = guided(SHARP, BLURRED, strength, *interval)
    found = Heun(clip=False)(denoiser, jnp.asarray(levels, jnp.float32), lambda index: start)
    np.testing.assert_allclose(found / (levels[0] * start), expected, rtol=1e-4 if interval[0] == 0 else 2e-2)


def test_the_guide_is_called_only_where_it_is_needed():
    calls = []

    def counted(x, sigma):
        jax.debug.callback(lambda sigma: calls.append(float(sigma[0])), sigma)
        return BLURRED(x, sigma)

    levels = jnp.array([80.0, 9.0, 2.0, 0.5, 0.1, 0.0])
    program = jax.jit(lambda g: Heun()(guided(SHARP, counted, g, 0.4, 3.0), levels, lambda index: X))
    program(jnp.float32(2)).block_until_ready()
    jax.effects_barrier()
    assert sorted(set(calls)) == [0.5, 2.0]
    calls.clear()
    program(jnp.float32(1)).block_until_ready()
    jax.effects_barrier()
    assert calls == []


# models


def test_classifier_free_guidance_is_a_guide_without_labels():
    params, none = TEACHER.params, jnp.full(3, PLAIN.classes, jnp.int32)
    function, labels = GuidedDenoiser(TEACHER.config.function), jnp.asarray(LABELS, jnp.int32)
    found = jax.jit(function.denoiser(function.params(params, None, 1.5), labels))(X, SIGMA)
    f = jax.jit(TEACHER.config.function)
    reference = f(params, X, SIGMA, none)
    np.testing.assert_allclose(found, reference + 1.5 * (f(params, X, SIGMA, labels) - reference), atol=1e-5)
    assert np.abs(found - f(params, X, SIGMA, labels)).max() > 1e-3


def test_an_unconditional_guide_ignores_labels_and_another_one_has_its_own_parameters():
    plain = samples()
    for options in ({}, {"guide": GUIDE}, {"guide": PRIOR}):
        assert np.abs(samples(guidance=2.0, **options) - plain).max() > 1e-3
    np.testing.assert_allclose(samples(guidance=2.0, guide=TEACHER), plain, atol=1e-5)


def test_one_program_serves_every_strength_and_interval():
    samples(guidance=1.5, noise=X[None])
    before = generation._from_noise._cache_size()
    samples(guidance=3.0, noise=X[None])
    samples(guidance=2.0, guidance_interval=(0.28, 2.9), noise=X[None])
    assert generation._from_noise._cache_size() == before


def test_guided_images_do_not_depend_on_the_batch():
    options = {"guidance": 1.5, "guide": GUIDE}
    np.testing.assert_allclose(samples(batch_size=8, **options), samples(batch_size=24, **options), atol=1e-5)


def test_an_interval_that_ends_below_all_levels_changes_nothing():
    found = samples(guidance=4.0, guidance_interval=(0.0, 1e-3))
    np.testing.assert_allclose(found, samples(), atol=1e-6)


def test_a_guided_student_edits_with_the_default_levels_at_every_strength():
    network = dataclasses.replace(PLAIN, guidance_embedding=True)
    config = ModelConfig(network, ConsistencyPreconditioning(), guidance_range=(1.0, 3.0))
    student = Model(config, random_params(network))
    pictures, levels = np.tanh(X), Strokes().default_sigmas((8, 8, 3))

    def edits(**options):
        return student.edit(0, pictures, Strokes(), labels=0, **options)

    np.testing.assert_array_equal(edits(), edits(guidance=1.0, sigmas=levels))
    np.testing.assert_array_equal(edits(guidance=3.0), edits(guidance=3.0, sigmas=levels))
    assert np.abs(edits() - edits(guidance=3.0)).max() > 1e-3
    frames = [student.interpolate_images(0, *pictures[:2], 2, labels=0, guidance=g) for g in (None, 1.0, 3.0)]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert np.abs(frames[0] - frames[2]).max() > 1e-3


REFUSED = {
    "consistency model": (model(PLAIN, preconditioning=ConsistencyPreconditioning()), {"guidance": 2}, "got a consist"),
    "unconditional model": (PRIOR, {"guidance": 2}, "is unconditional"),
    "no label dropout": (model(PLAIN, label_dropout=0.0), {"guidance": 2}, "without label dropout"),
    "strength": (TEACHER, {"guidance": -1}, r"guidance in \[0, 1000\].*got -1"),
    "huge": (TEACHER, {"guidance": 10**400}, r"guidance in \[0, 1000\]"),
    "huge interval": (TEACHER, {"guidance": 2, "guidance_interval": (0, 10**400)}, "two noise levels"),
    "not finite": (TEACHER, {"guidance": float("nan")}, "got nan"),
    "no strength": (TEACHER, {"guide": GUIDE}, "give guidance as well"),
    "interval": (TEACHER, {"guidance": 2, "guidance_interval": (3, 1)}, "0 <= lo < hi.*got 3,1"),
    "one level": (TEACHER, {"guidance": 2, "guidance_interval": (3,)}, "two noise levels"),
    "consistency guide": (
        *(TEACHER, {"guidance": 2, "guide": model(PLAIN, preconditioning=ConsistencyPreconditioning())}),
        "as guide, got a consistency model",
    ),
    "other images": (TEACHER, {"guidance": 2, "guide": model(SMALL)}, r"shape \[16, 16, 3\].*are \[8, 8, 3\]"),
    "other classes": (
        *(TEACHER, {"guidance": 2, "guide": model(dataclasses.replace(PLAIN, classes=4))}),
        "4 classes, and the model has 3",
    ),
    "other class names": (
        model(PLAIN, class_names=("cat", "dog", "owl")),
        {"guidance": 2, "guide": model(PLAIN, class_names=("cat", "fox", "owl"))},
        "as guide, got one whose class 1 is 'fox', and the model's is 'dog'",
    ),
    "classes in another order": (
        model(PLAIN, class_names=("cat", "dog", "owl")),
        {"guidance": 2, "guide": model(PLAIN, class_names=("dog", "cat", "owl"))},
        "class 0 is 'dog', and the model's is 'cat'",
    ),
    "no model": (TEACHER, {"guidance": 2, "guide": "other"}, "Expected a Model as guide"),
}


def test_what_decides_guided_images_is_described():
    churn, plain = Heun(churn=Churn(40, 0.05)), TEACHER.plan(steps=2)
    assert plain.described().keys() == {"sampler", "steps", "sigmas", "clip"}
    assert (plain.described()["clip"], TEACHER.plan(clip=False).described()["clip"]) == (True, False)
    options = {"guidance": 2.0, "guidance_interval": (0.28, 2.9), "steps": 2}
    found = [TEACHER.plan(sampler=churn, guide=guide, **options).described() for guide in (GUIDE, PRIOR)]
    assert found[0] != found[1]
    json.dumps(found, allow_nan=False)
    assert sampler_text(found[0]) == "Heun(churn=Churn(amount=40, sigma_min=0.05, sigma_max=inf, noise=1.0))"
    expected = f"guidance 2 by the model of SHA-256 {digest(GUIDE.params)[:12]} for sigma in (0.28, 2.9]"
    assert guidance_text(found[0]) == expected
    assert guidance_text(TEACHER.plan(guidance=2.0).described()) == "guidance 2"
    assert guidance_text(plain.described()) == ""


def test_guides_with_synonyms_or_without_names_are_accepted():
    named = model(PLAIN, class_names=("cat", "dog, hound", "owl"))
    for guide in (model(PLAIN, class_names=("Cat", "hound", "owl")), GUIDE, PRIOR):
        assert named.plan(guidance=2.0, guide=guide).guidance.guide is guide
    assert TEACHER.plan(guidance=2.0, guide=named).guidance.guide is named


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_guided_is_refused(case):
    refused, options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        refused.plan(**options)
