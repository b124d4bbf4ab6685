"""Properties of all objectives: images are independent, curricula compile once, only the student is trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Constant, Progressive
from cm_jax.diffusion.losses import Squared
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives import (
    AdaptiveWeight,
    Batch,
    ConsistencyDistillation,
    ContinuousDistillation,
    ContinuousTraining,
    FrozenParams,
    MeanFlow,
    Models,
    ProgressiveDistillation,
)
from cm_jax.objectives.distances import Resized
from cm_jax.types import Network, split_keys
from tests.support import SMALL
from tests.tiny import (
    BATCH,
    BOUNDARY,
    EDM,
    FUNCTIONS,
    HELPERS,
    KEYS,
    LATE,
    OBJECTIVES,
    OTHER,
    PARAMS,
    SHAPE,
    Tiny,
    everything,
)


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
