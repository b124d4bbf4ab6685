"""Losses on pairs of noise levels: exact solutions have none, and the error of a solver has its order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import ShrinkingGap
from cm_jax.diffusion.losses import InverseGap, PseudoHuber, Uniform
from cm_jax.diffusion.preconditioning import Preconditioning
from cm_jax.objectives import (
    ConsistencyDistillation,
    ConsistencyTraining,
    Denoising,
    EasyConsistencyTuning,
    EulerStep,
    HeunStep,
    Models,
)
from cm_jax.types import per_image
from tests.support import gaussian_denoiser
from tests.tiny import BATCH, EDM, FUNCTIONS, HELPERS, KEYS, LATE, NOISE, OBJECTIVES, PARAMS, SCHEDULE, SHAPE, Tiny


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
