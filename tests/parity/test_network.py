"""Parity of ADMUNet and its preconditioning with recorded outputs of PyTorch."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cm_jax.conversion.parity import reference_network
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.unet_format import DIFFUSERS, OPENAI
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.networks import ADMUNet
from cm_jax.networks.layers import sinusoid
from cm_jax.types import per_image
from tests.support import DATA, adm_golden, compiled, filled, nhwc, relative, tensor_names

BOUND = 1e-5
CONFIGURATIONS = ["class_cond", "conv_resample", "unconditional"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_recorded_network_output(each_implementation, name, optimized):
    network, params, golden = adm_golden(name)
    labels = jnp.asarray(golden["y"]) if "y" in golden else None
    out = compiled(network).predict(params, jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["timesteps"]), labels)
    assert relative(out, nhwc(golden["out"])) < BOUND


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(
    ("preconditioning", "key"),
    [(EDMPreconditioning(), "denoised_edm"), (ConsistencyPreconditioning(), "denoised_consistency")],
)
def test_recorded_denoiser_and_consistency_function(name, preconditioning, key):
    network, params, golden = adm_golden(name)
    labels = jnp.asarray(golden["y"]) if "y" in golden else None
    x, sigmas = jnp.asarray(nhwc(golden["x_sigma"])), jnp.asarray(golden["sigmas"])
    output = ConsistencyFunction(compiled(network), preconditioning)(params, x, sigmas, labels)
    assert relative(output, nhwc(golden[key])) < BOUND


# Networks whose weights are filled by a formula, see formula_params.
FORMULA = {
    "A": ADMUNet(
        image_size=16,
        base_channels=32,
        channel_mult=(1, 2),
        blocks_per_level=2,
        attention_factors=(2,),
        head_dim=16,
        classes=10,
    ),
    "B": ADMUNet(
        image_size=16,
        base_channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        head_dim=32,
        classes=None,
        modulation="additive",
        resampling="convolution",
    ),
}


@functools.cache
def formula_params(name):
    network = FORMULA[name]
    order = {tensor: position for position, tensor in enumerate(tensor_names(OPENAI, network))}

    def fill(tensor, shape):
        numbers = (7919 * order[tensor] + 104729 * np.arange(np.prod(shape), dtype=np.int64)) % 10007 / 10007
        gain = 1.0 if len(shape) == 1 and tensor.endswith(".weight") else 0.0
        return (0.2 * (numbers - 0.5) + gain).reshape(shape).astype(np.float32)

    return filled(OPENAI, network, fill)


@pytest.mark.parametrize("name", FORMULA)
@pytest.mark.parametrize(
    ("key", "preconditioning"),
    [("raw", None), ("denoise_distill0", EDMPreconditioning()), ("denoise_distill1", ConsistencyPreconditioning())],
)
def test_formula_filled_networks(name, key, preconditioning):
    """Compare with float64, because these weights amplify float32 rounding.

    The recorded output differs by up to 9e-5 from the same PyTorch network in float64. The cm_jax output must be within
    BOUND of the float64 output, or closer to it than the recorded output.
    """
    network, params = FORMULA[name], formula_params(name)
    golden = nhwc(np.load(DATA / "openai" / "openai_formula_weights.npz")[f"unet_{name}_{key}"])
    pattern = 2 * ((31 * np.arange(2 * 3 * 16 * 16)) % 101 / 101 - 0.5)
    x = jnp.asarray(nhwc(pattern.reshape(2, 3, 16, 16)), jnp.float32)
    labels = jnp.array([3, 7]) if network.classes else None
    sigma, time = jnp.array([80, 0.5]), jnp.array([1095.5067138671875, -173.2867889404297])
    network_input = x if preconditioning is None else per_image(preconditioning.c_in(sigma)) * x
    exact = float64_output(network, params, network_input, time, labels)
    if preconditioning is None:
        output = compiled(network).predict(params, x, time, labels)
    else:
        output = ConsistencyFunction(compiled(network), preconditioning)(params, x, sigma, labels)
        exact = np.asarray(preconditioning.blend(x, sigma, jnp.asarray(exact, jnp.float32), 0.002))
    assert relative(output, exact) < max(BOUND, relative(golden, exact))
    assert relative(output, golden) < BOUND + 2 * relative(golden, exact)


def float64_output(network, params, x, time, labels):
    """Output of the diffusers network in float64 for the same float32 weights and inputs."""
    reference = reference_network(network, to_source(DIFFUSERS.rules(network), params)).double()
    conditioning = {} if labels is None else {"class_labels": torch.from_numpy(np.array(labels))}
    nchw = torch.from_numpy(np.array(x, np.float64).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return nhwc(reference(nchw, torch.from_numpy(np.array(time, np.float64)), **conditioning).sample.numpy())


def test_parameter_counts_of_the_formula_networks():
    assert FORMULA["A"].parameter_count() == 1_153_923
    assert FORMULA["B"].parameter_count() == 702_499


def test_recorded_sinusoid_preconditioning_and_schedule():
    golden = np.load(DATA / "openai" / "openai_formula_weights.npz")
    embedded = sinusoid(jnp.asarray(golden["temb_in"]), 192)
    # cos and sin of angles up to 1554, which float32 resolves only to 1e-4
    np.testing.assert_allclose(embedded, golden["temb_dim192"], atol=2e-4)
    sigmas = jnp.asarray(golden["karras40"][:40])
    for preconditioning, key in [
        (EDMPreconditioning(), "scalings_edm"),
        (ConsistencyPreconditioning(), "scalings_boundary"),
    ]:
        output = np.stack(
            [preconditioning.c_skip(sigmas, 0.002), preconditioning.c_out(sigmas, 0.002), preconditioning.c_in(sigmas)]
        )
        np.testing.assert_allclose(output, golden[f"{key}_on_karras40"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        EDMPreconditioning().c_noise(sigmas), golden["rescaled_t_on_karras40"], rtol=1e-6, atol=1e-4
    )
    for count in (40, 151, 201):
        np.testing.assert_allclose(KarrasSchedule().descending(count), golden[f"karras{count}"][:-1], rtol=2e-6)


# Three variants of the small test network of diffusers, filled by flavor_params.
TEST_NETWORK = ADMUNet(
    image_size=32,
    base_channels=32,
    channel_mult=(1, 2),
    blocks_per_level=2,
    attention_factors=(2,),
    head_dim=8,
    classes=1000,
)
FLAVORS = {
    "cond": TEST_NETWORK,
    "uncond": ADMUNet(**{**vars(TEST_NETWORK), "classes": None}),
    "default_shift": ADMUNet(**{**vars(TEST_NETWORK), "classes": None, "modulation": "additive"}),
}


@functools.cache
def flavor_params(flavor):
    network = FLAVORS[flavor]
    order = {tensor: position for position, tensor in enumerate(sorted(tensor_names(DIFFUSERS, network)))}

    def fill(tensor, shape):
        wave = np.sin(0.7 * np.arange(np.prod(shape)) + 1.3 * order[tensor]).reshape(shape)
        if tensor.endswith(".bias"):
            return (0.1 * wave).astype(np.float32)
        if len(shape) == 1:
            return (1 + 0.1 * wave).astype(np.float32)
        scale = 0.5 * 4 if tensor == "class_embedding.weight" else 1 / np.sqrt(np.prod(shape[1:]))
        return (wave * scale * (4 if "time_emb" in tensor else 1)).astype(np.float32)

    return filled(DIFFUSERS, network, fill)


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(("key", "time"), [("t1095", 1095.506658668), ("t80", 80.949484823), ("t-1553", -1553.652)])
def test_diffusers_networks(flavor, key, time):
    network, golden = FLAVORS[flavor], np.load(DATA / "diffusers" / "diffusers_golden.npz")
    labels = jnp.array([7, 999]) if network.classes else None
    x, params = jnp.asarray(nhwc(golden["X"])), flavor_params(flavor)
    out = compiled(network).predict(params, x, jnp.full(2, time), labels)
    assert relative(out, nhwc(golden[f"{flavor}_unet_{key}"])) < BOUND
