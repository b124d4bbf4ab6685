"""The parity check for the EDM family. test_edm_family.py compares its PyTorch networks with recorded outputs."""

import dataclasses

import numpy as np
import pytest
import torch

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.edm_parity import Reference, preconditioning
from cm_jax.conversion.parity import BOUND, compare
from cm_jax.conversion.read import Source
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.types import leaves, nested
from tests.parity.test_edm_family import FOLDER, SEGMENTS, inputs_of, source_of
from tests.support import random_params


@pytest.mark.parametrize(
    "name", ["edm_ddpmpp_cond", "scm_ddpmpp_uncond", "ve_ncsnpp_uncond", "iddpm_adm_cond", SEGMENTS]
)
def test_every_tensor_is_used(name):
    """The outputs that the check compares depend on every tensor."""
    source = source_of(name)
    network, inputs = Reference(source)._network, inputs_of(source, 1)
    tensors = {key: tensor.requires_grad_() for key, tensor in network.tensors.items() if key != "u"}
    x, time = torch.from_numpy(inputs.x[:1]).permute(0, 3, 1, 2), torch.from_numpy(inputs.c_noise[:1])
    others = (inputs.one_hot, inputs.augmentation, inputs.segment)
    given = (each if each is None else torch.from_numpy(each[:1]) for each in others)
    output = network(x, time, *given).square().sum()
    if "logvar_linear.weight" in tensors:
        output = output + network.log_variance(time).sum()
    gradients = torch.autograd.grad(output, list(tensors.values()))
    assert [key for key, gradient in zip(tensors, gradients, strict=True) if not gradient.any()] == []


@pytest.mark.parametrize("name", ["edm_adm_cond", "edm2_guide_uncond"])
def test_the_check_passes(name):
    parity = compare(source_of(name))
    assert parity.passed
    assert parity.units == {}
    assert {"network", "c_in", "c_skip", "c_out", "c_noise"} <= parity.parts.keys()
    assert "PyTorch (the network of the EDM family, float32, 3 inputs)" in parity.report()


def test_the_check_names_the_block_and_the_coefficient_that_differ():
    source = source_of("edm2_guide_uncond")
    flat = dict(leaves(source.params))
    flat["middle/residual_2/conv_1/kernel"] = flat["middle/residual_2/conv_1/kernel"][::-1]
    config = dataclasses.replace(source.config, preconditioning=ConsistencyPreconditioning(time_factor=0.25))
    parity = compare(dataclasses.replace(source, params=nested(flat), config=config))
    assert not parity.passed
    assert parity.parts["c_noise"] < BOUND < parity.parts["c_skip"]
    assert next(name for name, value in parity.units.items() if value > BOUND) == "middle/residual_2"
    assert "middle/residual_2" in parity.report()


@pytest.mark.parametrize("name", ["ve_ncsnpp_uncond", "edm2_latent_uncond"])
def test_native_networks_are_checked_in_the_names_of_edm(name):
    """The tensors that --to edm writes are the same network as the pickle."""
    source = source_of(name)
    inputs, native = inputs_of(source, 1), dataclasses.replace(source, record=None, tensors={})
    np.testing.assert_array_equal(Reference(native).run(inputs), Reference(source).run(inputs))
    assert preconditioning(native, np.ones(1)) == {}


def test_a_table_of_classes_becomes_the_linear_layer_of_edm():
    network = SongUNet(image_size=8, base_channels=8, channel_mult=(1, 1), blocks_per_level=1, classes=3)
    config, params = ModelConfig(network, ConsistencyPreconditioning()), random_params(network)
    tensors = Reference(Source(FOLDER, config, params))._network.tensors
    one_hot = torch.eye(3) * 3**0.5
    labels = one_hot @ tensors["map_label.weight"].T + tensors["map_label.bias"]
    np.testing.assert_allclose(labels, params["embedding"]["table"], rtol=1e-6)


def test_networks_that_edm_does_not_have_are_refused():
    network = SongUNet(image_size=(8, 16), base_channels=8, channel_mult=(1, 1), blocks_per_level=1)
    config = ModelConfig(network, ConsistencyPreconditioning())
    with pytest.raises(InputError, match=r"--check cannot run this network .* square networks only"):
        Reference(Source(FOLDER, config, {}))
