"""A Model is a pytree of its parameters, and its functions compose with jit, grad, vmap, optax and Orbax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.samplers import image_keys, sample
from tests.support import SMALL, random_params
from tests.tiny import BOUNDARY, PARAMS

TINY = dataclasses.replace(SMALL, image_size=8, channel_mult=(1,), attention_factors=(), classes=3)
CONFIG = ModelConfig(TINY, ConsistencyPreconditioning(), num_levels=18)
FIRST, SECOND = (Model(CONFIG, TINY.prepare(random_params(TINY, seed))) for seed in (0, 1))
X = jnp.linspace(-3, 3, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
LABELS = jnp.array([2, 0])


def denoise(model, x, sigma, labels):
    return model.denoise(x, sigma, labels)


@pytest.mark.parametrize("sigma", [2.0, jnp.array([0.5, 80.0])], ids=["one", "each"])
@pytest.mark.parametrize("labels", [LABELS, jnp.int32(1)], ids=["each", "one"])
def test_denoise_with_everything_traced(sigma, labels):
    expected = FIRST.denoise(X, sigma, labels)
    np.testing.assert_allclose(jax.jit(denoise)(FIRST, X, sigma, labels), expected, atol=1e-5)


def test_denoise_over_an_ensemble_of_models():
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), FIRST, SECOND)
    found = jax.jit(jax.vmap(denoise, in_axes=(0, None, None, None)))(both, X, 2.0, LABELS)
    expected = jnp.stack([model.denoise(X, 2.0, LABELS) for model in (FIRST, SECOND)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_and_optax_updates_of_a_model():
    @jax.jit
    def step(model, state):
        value, gradient = jax.value_and_grad(lambda model: (denoise(model, X, 2.0, LABELS) ** 2).mean())(model)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    optimizer = optax.adamw(1e-3)
    model, state, values = FIRST, optimizer.init(FIRST), []
    for _ in range(3):
        model, state, value = step(model, state)
        values.append(value)
    assert isinstance(model, Model)
    assert model.config == CONFIG
    assert values[0] > values[1] > values[2]


def test_derivatives_along_the_noise_level():
    _, slope = jax.jvp(lambda sigma: FIRST.denoise(X, sigma, 1), (jnp.float32(2.0),), (jnp.float32(1.0),))
    around = [np.asarray(FIRST.denoise(X, sigma, 1), np.float64) for sigma in (1.9995, 2.0005)]
    np.testing.assert_allclose(slope, (around[1] - around[0]) / 1e-3, atol=0.2)


def test_orbax_restores_a_model(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", FIRST)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", jax.eval_shape(lambda: FIRST))
    assert isinstance(restored, Model)
    jax.tree.map(np.testing.assert_array_equal, restored, FIRST)


def test_trees_of_anything_but_arrays():
    shapes = jax.eval_shape(lambda model: model, FIRST)
    assert shapes.params["stem"]["kernel"].shape == FIRST.params["stem"]["kernel"].shape
    assert jax.tree.leaves(jax.tree.map(lambda leaf: None, FIRST)) == []
    assert jax.tree.structure(FIRST) == jax.tree.structure(jax.device_put(SECOND))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(FIRST)]
    assert ".params['stem']['kernel']" in paths


def test_models_that_differ_in_settings_differ_in_structure():
    other = dataclasses.replace(FIRST, config=dataclasses.replace(CONFIG, preconditioning=EDMPreconditioning()))
    assert jax.tree.structure(other) != jax.tree.structure(FIRST)
    with pytest.raises(ValueError, match="different pytree metadata"):
        jax.tree.map(jnp.add, FIRST, other)


PLAN = FIRST.plan(steps=2)


@functools.partial(jax.jit, static_argnums=0)
def two_steps(function, params, key):
    keys = image_keys(key, jnp.arange(2))
    return sample(function, PLAN.sampler, params, PLAN.levels, keys, LABELS)


def test_sampling_inside_jit_gives_the_images_of_the_model():
    expected = FIRST.sample(5, 2, labels=LABELS, steps=2)
    np.testing.assert_allclose(two_steps(CONFIG.function, FIRST.params, jax.random.key(5)), expected, atol=1e-5)


def test_sampling_maps_over_seeds_and_has_gradients():
    seeds = jax.random.split(jax.random.key(0), 3)
    images = jax.vmap(two_steps, (None, None, 0))(BOUNDARY, PARAMS, seeds)
    np.testing.assert_allclose(images[1], two_steps(BOUNDARY, PARAMS, seeds[1]), atol=1e-5)

    def brightness(params):
        return two_steps(BOUNDARY, params, seeds[1]).mean()

    gradient = jax.jit(jax.grad(brightness))(PARAMS)
    size = optax.tree.norm(gradient)
    uphill = jax.tree.map(lambda leaf, slope: leaf + 1e-2 / size * slope, PARAMS, gradient)
    np.testing.assert_allclose(brightness(uphill) - brightness(PARAMS), 1e-2 * size, rtol=0.1)


@pytest.mark.parametrize("function", [
    lambda model: model.sample(0, 2, labels=1),
    lambda model: FIRST.sample(jax.random.key(jnp.int32(model.params["stem"]["bias"][0])), 2, labels=1),
    lambda model: FIRST.interpolate_noise(jax.random.key(0), 1, labels=jnp.int32(model.params["stem"]["bias"][0])),
])  # fmt: skip
def test_methods_that_return_numpy_arrays_refuse_traced_arguments(function):
    with pytest.raises(InputError, match=r"cm_jax\.samplers\.sample"):
        jax.jit(function)(FIRST)


@pytest.mark.usefixtures("unchecked_types")
def test_traced_labels_of_a_wrong_type_or_number():
    for labels in (jnp.zeros(2), jnp.zeros(3, jnp.int32)):
        with pytest.raises(InputError, match="labels"):
            jax.jit(denoise)(FIRST, X, 2.0, labels)
    with pytest.raises(InputError, match="sigma"):
        jax.jit(denoise)(FIRST, X, jnp.ones(3), LABELS)
