"""Properties of networks with their preconditioning, and of model configs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli.options import Sampling
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    IDDPMPreconditioning,
    MeanFlowPreconditioning,
    TrigFlowPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.samplers import SAMPLERS, Churn, Heun
from tests.support import SMALL, random_params


def test_the_consistency_function_is_the_identity_at_sigma_min():
    function = jax.jit(ConsistencyFunction(SMALL, ConsistencyPreconditioning()))
    x = 3 * jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    clean = function(random_params(SMALL), x, jnp.full(2, 0.002), jnp.array([1, 2]))
    np.testing.assert_array_equal(clean, x)


def test_a_denoiser_has_no_boundary_condition():
    function = jax.jit(ConsistencyFunction(SMALL, EDMPreconditioning()))
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    assert not np.array_equal(function(random_params(SMALL), x, jnp.full(2, 0.002), jnp.array([1, 2])), x)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_edm_preconditioning_gives_unit_variance_inputs_and_targets(sigma):
    """The demands from which EDM derives them (appendix B.6): unit-variance inputs and targets."""
    preconditioning, level = EDMPreconditioning(), jnp.array([sigma])
    variance = preconditioning.sigma_data**2 + sigma**2
    assert preconditioning.c_in(level)[0] ** 2 * variance == pytest.approx(1, rel=1e-5)
    target = (1 - preconditioning.c_skip(level)[0]) ** 2 * preconditioning.sigma_data**2 + preconditioning.c_skip(
        level
    )[0] ** 2 * sigma**2
    assert target == pytest.approx(float(preconditioning.c_out(level)[0]) ** 2, rel=1e-3)


def test_zero_output_gives_the_gaussian_denoiser():
    """For data from N(0, sigma_data^2) the best denoiser is c_skip x, so the raw network has nothing to add."""
    x, sigma = jnp.ones((3, 1, 1, 1)), jnp.array([0.002, 1.0, 80.0])
    exact = x * (0.25 / (0.25 + sigma**2))[:, None, None, None]
    np.testing.assert_allclose(EDMPreconditioning().blend(x, sigma, jnp.zeros_like(x), 0.002), exact, rtol=1e-6)


def test_an_initialized_network_outputs_zero():
    params = SMALL.initialize(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    assert not jax.jit(SMALL.predict)(params, x, jnp.array([1.0, -100.0]), jnp.array([0, 9])).any()


def test_initialization_has_the_distributions_of_pytorch():
    params = SMALL.initialize(jax.random.key(0))
    kernel = params["down_0_0"]["residual"]["conv_1"]["kernel"]
    bound = 1 / np.sqrt(9 * 32)
    assert bound * 0.99 < jnp.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert jnp.abs(params["down_0_0"]["residual"]["conv_1"]["bias"]).max() <= bound
    assert params["embedding"]["table"].std() == pytest.approx(1, rel=0.05)
    again, other = SMALL.initialize(jax.random.key(0)), SMALL.initialize(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(kernel, other["down_0_0"]["residual"]["conv_1"]["kernel"])


def test_any_divisible_image_size_works():
    params = random_params(SMALL)
    out = jax.jit(SMALL.predict)(params, jnp.ones((1, 24, 40, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert out.shape == (1, 24, 40, 3)


def test_equal_networks_hash_alike():
    network = dataclasses.replace(SMALL, channel_mult=(1.0, 2.0), attention_factors=(2,))
    assert network == SMALL
    assert hash(network) == hash(SMALL)


PRECONDITIONINGS = [
    EDMPreconditioning(),
    ConsistencyPreconditioning(),
    TrigFlowPreconditioning(time_factor=300.0),
    MeanFlowPreconditioning(2.0),
]


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("consistency", [None, True, False])
def test_configs_with_any_preconditioning_round_trip(preconditioning, consistency):
    config = ModelConfig(SMALL, preconditioning, num_levels=18, consistency=consistency)
    assert ModelConfig.from_json(config.to_json(), "a test") == config


@pytest.mark.parametrize(
    ("preconditioning", "distilled"), list(zip(PRECONDITIONINGS, [False, True, False, True], strict=True))
)
def test_the_preconditioning_decides_what_a_model_is_unless_the_config_does(preconditioning, distilled):
    """Students of ECT and sCM are consistency functions with the preconditioning of a denoiser."""
    config = ModelConfig(SMALL, preconditioning)
    assert config.distilled == distilled
    assert dataclasses.replace(config, consistency=True).distilled
    assert not dataclasses.replace(config, consistency=False).distilled


@pytest.mark.parametrize(
    "preconditioning",
    [*PRECONDITIONINGS, VPPreconditioning(), VEPreconditioning(), IDDPMPreconditioning()],
    ids=lambda each: type(each).__name__,
)
def test_coefficients_are_finite_without_noise(preconditioning):
    """Model.denoise accepts sigma = 0; embeddings take sines of c_noise, which are NaN where it is infinite."""
    zero = jnp.zeros(1)
    coefficients = [preconditioning.c_skip(zero, 0.0), preconditioning.c_out(zero, 0.0), preconditioning.c_in(zero)]
    assert np.isfinite([*coefficients, preconditioning.c_noise(zero)]).all()


def test_a_config_without_the_field_consistency_is_readable():
    config = ModelConfig(SMALL, ConsistencyPreconditioning())
    fields = json.loads(config.to_json())
    del fields["consistency"]
    assert ModelConfig.from_json(json.dumps(fields), "an old one") == config


def test_tuned_sigmas_round_trip_and_contradictions_are_refused():
    config = ModelConfig(SMALL, EDMPreconditioning(), consistency=True, tuned_sigmas=((80.0, 0.821),))
    assert ModelConfig.from_json(config.to_json(), "a test") == config
    with pytest.raises(InputError, match="for 2 steps, got both"):
        dataclasses.replace(config, tuned_timesteps=((22, 0),))
    for wrong in ((), (0.8, 80.0), (80.0, 0.0), (float("nan"),), (float("inf"),)):
        with pytest.raises(InputError, match="tuned sigmas that descend"):
            dataclasses.replace(config, tuned_sigmas=(wrong,))


def test_a_config_without_tuned_sigmas_and_clipping_is_readable():
    config = ModelConfig(SMALL, ConsistencyPreconditioning())
    fields = json.loads(config.to_json())
    del fields["tuned_sigmas"], fields["clip_denoised"]
    assert ModelConfig.from_json(json.dumps(fields), "an old one") == config


def test_options_of_samplers_on_the_command_line():
    denoiser = Model(ModelConfig(SMALL, EDMPreconditioning()), {})
    plan = Sampling(churn="40,0.05,50,1.003", clip="off", steps=3).plan(denoiser)
    assert plan.sampler == Heun(False, Churn(40, 0.05, 50, 1.003), EDMPreconditioning())
    assert Sampling(sampler="dpm").plan(denoiser).sampler == SAMPLERS["dpm"]
    with pytest.raises(InputError, match="--sampler heun or dpm"):
        Sampling(sampler="euler", churn="40").plan(denoiser)
    progressive = Model(dataclasses.replace(denoiser.config, default_sampler="progdist"), {})
    with pytest.raises(InputError, match="--sampler heun or dpm, got progdist"):
        Sampling(churn="40").plan(progressive)
    assert Sampling(churn="40", sampler="heun").plan(progressive).sampler == Sampling(churn="40").plan(denoiser).sampler
    with pytest.raises(InputError, match="S_churn"):
        Sampling(churn="1,2,3,4,5").plan(denoiser)
    with pytest.raises(InputError, match="interval_embedding"):
        Sampling(sampler="segments").plan(denoiser)


@pytest.mark.parametrize("preconditioning", [EDMPreconditioning(), TrigFlowPreconditioning()])
def test_a_student_with_edm_preconditioning_samples_in_one_step(preconditioning):
    params = random_params(SMALL)
    student = Model(ModelConfig(SMALL, preconditioning, consistency=True), params)
    noise = np.asarray(jax.random.normal(jax.random.key(0), (1, 2, 16, 16, 3)))
    f = jax.jit(student.config.function)
    expected = jnp.clip(f(params, 80 * noise[0], jnp.full(2, 80.0), jnp.array([1, 2])), -1, 1)
    np.testing.assert_allclose(student.sample(0, 2, labels=[1, 2], noise=noise), expected, atol=1e-5)
    assert student.plan(steps=3).sampler == SAMPLERS["consistency"]
    teacher = Model(dataclasses.replace(student.config, consistency=None), params)
    assert teacher.plan().sampler == SAMPLERS["heun"]


@pytest.mark.parametrize("kind", ["openai", "diffusers"])
@pytest.mark.parametrize(
    ("preconditioning", "wanted"),
    [
        (EDMPreconditioning(), "with EDM preconditioning"),
        (TrigFlowPreconditioning(), "c_noise"),
        (MeanFlowPreconditioning(), "c_noise"),
    ],
)
def test_third_party_formats_cannot_hold_such_a_student(kind, preconditioning, wanted, tmp_path):
    config = ModelConfig(SMALL, preconditioning, consistency=True)
    with pytest.raises(InputError, match=wanted):
        conversion.write(tmp_path / "there", kind, config, random_params(SMALL))
    assert not list(tmp_path.iterdir())


def test_trigflow_differs_from_edm_in_c_noise_alone():
    sigma = jnp.array([0.002, 0.5, 80.0])
    trigflow, edm = TrigFlowPreconditioning(), EDMPreconditioning()
    for name in ("c_skip", "c_out", "c_in"):
        np.testing.assert_array_equal(getattr(trigflow, name)(sigma), getattr(edm, name)(sigma))
    np.testing.assert_allclose(trigflow.c_noise(sigma), [0.004, np.pi / 4, 1.56455], rtol=1e-5)
