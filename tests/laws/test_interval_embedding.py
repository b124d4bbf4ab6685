"""Networks with an interval embedding, and MeanFlow's network as a consistency function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.unet_format import DIFFUSERS, OPENAI
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import MeanFlowPreconditioning, TrigFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.objectives import Batch, FrozenParams, MeanFlow, Models
from cm_jax.samplers import Segments
from cm_jax.types import leaves, per_image
from tests.support import random_params, relative

ADM = ADMUNet(
    image_size=8,
    base_channels=32,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    head_dim=32,
    classes=3,
    interval_embedding=True,
    attention="plain",
)
SONG = SongUNet(
    image_size=8,
    base_channels=8,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    fourier_scale=0.5,
    classes=3,
    interval_embedding=True,
    attention="plain",
)
NETWORKS = {"adm": ADM, "song": SONG}
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
TIME, LENGTH = jnp.array([0.9, 0.4]), jnp.array([0.7, 0.1])
LABELS = jnp.array([1, 2])


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def test_the_interval_embedding_adds_one_branch_and_changes_nothing_else(network):
    """Checkpoints, converters and parameter counts of networks without it do not change."""
    both, one = (dict(leaves(n.shapes())) for n in (network, dataclasses.replace(network, interval_embedding=False)))
    assert {path: leaf for path, leaf in both.items() if not path.startswith("length/")} == one
    added = {path.removeprefix("length/") for path in both.keys() - one.keys()}
    assert added == {path.removeprefix("embedding/") for path in one if path.startswith("embedding/")} - {"table"}


def test_without_a_length_it_is_the_whole_way_to_the_data(network):
    params, predict = random_params(network), jax.jit(network.predict)
    whole = predict(params, X, TIME, LABELS)
    np.testing.assert_array_equal(whole, predict(params, X, TIME, LABELS, None, TIME))
    assert relative(predict(params, X, TIME, LABELS, None, LENGTH), whole) > 1e-3


def test_a_network_without_interval_embedding_refuses_a_length(network):
    one = dataclasses.replace(network, interval_embedding=False)
    with pytest.raises(InputError, match="interval_embedding=True"):
        one.predict(random_params(one), X, TIME, LABELS, None, LENGTH)


def test_forward_derivatives_through_both_embeddings(network):
    """Against central differences, within single precision: by time and length alone, and by all inputs together."""
    params = random_params(network)
    u = jax.jit(lambda z, t, length: network.predict(params, z, t, LABELS, None, length))
    direction, one = jax.random.normal(jax.random.key(1), X.shape), jnp.ones(2)
    for along in ((0 * X, one, 0 * one), (0 * X, 0 * one, one), (direction, one, one)):
        _, derivative = jax.jvp(u, (X, TIME, LENGTH), along)
        ahead, behind = (u(*(a + h * d for a, d in zip((X, TIME, LENGTH), along, strict=True))) for h in (1e-2, -1e-2))
        assert relative(derivative, (ahead - behind) / 2e-2) < 5e-3


@pytest.mark.parametrize("spelling", [OPENAI, DIFFUSERS])
def test_third_party_formats_have_no_interval_embedding(spelling):
    with pytest.raises(InputError, match="no networks with an interval embedding"):
        spelling.rules(ADM)


def test_mean_flow_makes_a_consistency_function(network):
    """f(x, sigma) = z - t u(z, t, t), f(x, 0) = x, and where there is hardly any data left, f = e - u(e, 1, 1)."""
    params, function = random_params(network), ConsistencyFunction(network, MeanFlowPreconditioning(time_factor=2.0))
    predict = jax.jit(network.predict)
    f = jax.jit(lambda x, sigma: function(params, x, sigma, LABELS))
    np.testing.assert_array_equal(f(X, jnp.zeros(2)), X)
    sigma = jnp.array([3.0, 0.25])
    t = jnp.array([0.75, 0.2])
    z = X / per_image(1 + sigma)
    u = predict(params, z, 2 * t, LABELS, None, 2 * t)
    np.testing.assert_allclose(f(X, sigma), z - per_image(t) * u, atol=1e-5)
    far = f(1e6 * X, jnp.full(2, 1e6))
    at_once = X - predict(params, X, jnp.full(2, 2.0), LABELS, None, jnp.full(2, 2.0))
    np.testing.assert_allclose(far, at_once, atol=1e-4)


def test_a_mean_flow_model_draws_in_one_step_like_any_other(network):
    function = MeanFlowPreconditioning()
    model = Model(ModelConfig(network, function), random_params(network))
    assert model.config.distilled
    assert ModelConfig.from_json(model.config.to_json(), "a test") == model.config
    noise = np.random.default_rng(0).standard_normal((1, 2, 8, 8, 3)).astype(np.float32)
    images = model.sample(0, 2, labels=[1, 2], noise=noise)
    direct = model.denoise(80 * noise[0], 80.0, labels=[1, 2])
    np.testing.assert_allclose(images, np.clip(direct, -1, 1), atol=1e-5)
    assert model.sample(0, 2, labels=[1, 2], steps=2).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("sigma_max", [80.0, 5.0])
def test_segments_of_mean_flow_have_equal_steps_in_its_time(sigma_max):
    """t = 1 (sigma_max stands for it), 1 - 1/n, ..., 0, with the z_t = x / (1 + sigma) of MeanFlow's sampler."""
    config = ModelConfig(SONG, MeanFlowPreconditioning(), KarrasSchedule(sigma_max=sigma_max))
    model = Model(config, random_params(SONG))
    for steps in (1, 2, 4):
        levels = np.asarray(model.plan(sampler="segments", steps=steps).levels)
        assert levels[0] == sigma_max
        np.testing.assert_allclose(levels[1:] / (1 + levels[1:]), 1 - np.arange(1, steps + 1) / steps, atol=1e-12)
    levels = np.asarray(model.plan(sampler="segments", steps=200).levels)
    assert len(levels) == 201
    np.testing.assert_allclose(np.diff(levels / (1 + levels)), -sigma_max / (1 + sigma_max) / 200, rtol=1e-6)
    trigflow = model.plan(sampler=Segments(spacing="time"), steps=4).levels
    np.testing.assert_allclose(np.diff(np.arctan(np.divide(trigflow, 0.5)), 2), 0, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_segments_of_other_models_have_equal_steps_in_trigflows_time(sigma_data):
    model = Model(ModelConfig(SONG, TrigFlowPreconditioning(sigma_data), consistency=True), random_params(SONG))
    levels = model.plan(sampler="segments", steps=4).levels
    np.testing.assert_allclose(np.diff(np.arctan(np.divide(levels, sigma_data)), 2), 0, atol=1e-12)
    own = model.plan(sampler=Segments(sigma_data=0.25), steps=4).levels
    np.testing.assert_allclose(np.diff(np.arctan(np.divide(own, 0.25)), 2), 0, atol=1e-12)


def test_mean_flow_trains_both_embeddings_and_requires_them(network):
    models = Models(ConsistencyFunction(network, MeanFlowPreconditioning()))
    objective = MeanFlow()
    objective.check(models)
    keys = jax.random.split(jax.random.key(2), 2)

    def loss(params):
        return objective(models, params, FrozenParams(), Batch(jnp.tanh(X), LABELS), keys, 0)[0].mean()

    gradients = jax.jit(jax.grad(loss))(random_params(network))
    for branch in ("embedding", "length"):
        assert gradients[branch]["dense_1"]["kernel"].any()
    one = dataclasses.replace(network, interval_embedding=False)
    with pytest.raises(InputError, match="interval_embedding=True"):
        objective.check(Models(ConsistencyFunction(one, MeanFlowPreconditioning())))
    fused = dataclasses.replace(network, attention="auto")
    with pytest.raises(InputError, match='attention="plain"'):
        objective.check(Models(ConsistencyFunction(fused, MeanFlowPreconditioning())))
