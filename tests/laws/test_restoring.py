"""Files of third-party formats: reading them restores the function, with the hints that `unstated` names, or they are
not written.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import Latents, ModelConfig
from cm_jax.conversion import CheckpointHints, read, unstated, write
from cm_jax.conversion.parity import compare
from cm_jax.conversion.read import Source
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.unet_format import OPENAI
from cm_jax.diffusion.noise_schedule import EDM_TIME, KarrasSchedule
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    MeanFlowPreconditioning,
    TrigFlowPreconditioning,
    VPPreconditioning,
)
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, EDM2UNet, SongUNet
from cm_jax.types import leaves
from tests.support import SMALL, assert_bitwise_equal, random_params

SONG = SongUNet(8, 3, 8, (1, 2), 1, (2,), label_embedding="linear", classes=3)
NARROW = ADMUNet(8, 3, 32, (1, 2), 1, (2,), head_dim=16, classes=3, variant="edm")
WIDE = ADMUNet(8, 3, 128, (1, 1.5), 1, (2,), head_dim=32, classes=None)
EDM2 = EDM2UNet(8, 3, 16, (1, 2), 1, (2,), head_dim=8, classes=None)
EDM = EDMPreconditioning(time_factor=EDM_TIME)
CONSISTENCY = ConsistencyPreconditioning(time_factor=EDM_TIME)


def restored(path, kind, config):
    """The model as read with the hints of `unstated`; its parameters are those that were written."""
    params = random_params(config.network)
    write(path, kind, config, params)
    source = read(path, CheckpointHints(**unstated(kind, config).hints))
    found, expected = ({name: np.asarray(leaf) for name, leaf in leaves(tree)} for tree in (source.params, params))
    assert_bitwise_equal(found, expected)
    return source.config


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(SONG, EDM),
        ModelConfig(dataclasses.replace(SONG, classes=None, channel_mult=(1,), attention_factors=()), EDM),
        ModelConfig(SONG, CONSISTENCY),
        ModelConfig(SONG, CONSISTENCY, KarrasSchedule(0.003)),
        ModelConfig(SONG, dataclasses.replace(CONSISTENCY, sigma_data=0.6), KarrasSchedule(0.01, 40, 5)),
        ModelConfig(NARROW, EDM, num_levels=18, class_names=("a", "b", "c"), tuned_timesteps=((8, 0),)),
        ModelConfig(NARROW, EDM, consistency=True),
        ModelConfig(WIDE, CONSISTENCY),
        ModelConfig(dataclasses.replace(WIDE, heads=6, head_dim=None), CONSISTENCY),
        ModelConfig(dataclasses.replace(NARROW, augment_dim=9, uncertainty=True, output_channels=6), EDM),
        ModelConfig(EDM2, EDM),
        ModelConfig(dataclasses.replace(EDM2, variant="trigflow", interval_embedding=True), TrigFlowPreconditioning()),
        ModelConfig(dataclasses.replace(SONG, modulation="normalized"), TrigFlowPreconditioning(), consistency=True),
    ],
)
def test_a_state_dict_of_edm_is_the_same_function(config, tmp_path):
    found = restored(tmp_path / "edm.safetensors", "edm", config)
    assert (found.preconditioning, found.schedule) == (config.preconditioning, config.schedule)
    assert found.distilled == config.distilled
    assert found.num_levels == config.num_levels
    assert found.class_names == config.class_names
    assert set(found.tuned_timesteps) == set(config.tuned_timesteps)
    network = config.network
    if len(network.channel_mult) == 1:
        network = dataclasses.replace(network, pyramid=False, resampling="plain")  # without effect on a single level
    if isinstance(network, ADMUNet):  # WIDE has no narrow levels, which variants build differently
        network = dataclasses.replace(network, variant="edm", heads=None, head_dim=network.head_dim or 32)
    assert found.network == network


def test_the_function_of_a_wide_network_of_openai_survives(tmp_path):
    config = ModelConfig(dataclasses.replace(WIDE, attention_factors=()), CONSISTENCY)
    x, sigma, params = jnp.ones((2, 8, 8, 3)), jnp.array([0.1, 10.0]), random_params(config.network)
    found, expected = (
        jax.jit(each.function)(params, x, sigma)
        for each in (restored(tmp_path / "edm.safetensors", "edm", config), config)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(WIDE, ConsistencyPreconditioning()), r"c_noise = 250 ln sigma \(it is always 0.25 ln sigma\)"),
        (ModelConfig(EDM2, VPPreconditioning()), r"VPPreconditioning \(read as EDMPreconditioning\)"),
        (ModelConfig(SONG, MeanFlowPreconditioning()), "MeanFlowPreconditioning"),
        (ModelConfig(SONG, TrigFlowPreconditioning()), "TrigFlowPreconditioning"),
        (ModelConfig(dataclasses.replace(EDM2, variant="trigflow"), EDM), "EDMPreconditioning"),
        (ModelConfig(SONG, CONSISTENCY, consistency=False), "ConsistencyPreconditioning"),
        (ModelConfig(dataclasses.replace(SMALL, classes=None), EDM), "other group norms"),
        (ModelConfig(dataclasses.replace(WIDE, norm_epsilon=1e-6), EDM), "other group norms"),
        (ModelConfig(dataclasses.replace(SONG, modulation="scale_shift"), EDM), "modulation='scale_shift'"),
        (ModelConfig(dataclasses.replace(SONG, output_channels=6), EDM), "output channels"),
        (ModelConfig(dataclasses.replace(EDM2, clip=8.0), EDM), "clip=8.0"),
        (ModelConfig(dataclasses.replace(WIDE, attention_factors=(1, 2), heads=4, head_dim=None), EDM), "heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_the_names_of_edm_would_change_are_refused(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write(tmp_path / "edm.safetensors", "edm", config, random_params(config.network))
    assert not list(tmp_path.iterdir())


FULL = {
    "num_levels": 18,
    "class_names": tuple("abcdefghij"),
    "tuned_timesteps": ((8, 0),),
    "tuned_sigmas": ((80.0, 2.0, 0.5),),
    "clip_denoised": False,
    "label_dropout": 0.0,
}
CONFIGS = {
    "a consistency model": ModelConfig(SMALL, ConsistencyPreconditioning(0.6), KarrasSchedule(0.01, 40, 5), **FULL),
    "a denoiser": ModelConfig(SMALL, EDMPreconditioning(), **FULL),
    "one of a stage of progressive distillation": ModelConfig(
        SMALL, EDMPreconditioning(), default_sampler="progdist", default_steps=4, **FULL
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_diffusers_restores_every_field(config, tmp_path):
    assert restored(tmp_path / "folder", "diffusers", config) == config
    changed = read(tmp_path / "folder", CheckpointHints(preconditioning="edm-consistency", num_levels=9)).config
    assert (changed.tuned_timesteps, changed.tuned_sigmas) == ((), ())
    two = read(
        tmp_path / "folder", CheckpointHints(**unstated("diffusers", config).hints, tuned_timesteps=((9, 4, 0),))
    )
    assert (two.config.tuned_timesteps, two.config.tuned_sigmas) == (((9, 4, 0),), ())


def test_a_file_of_openai_restores_the_model_and_what_it_does_not_contain_is_named(tmp_path):
    pytest.importorskip("torch", reason="PyTorch writes the files")
    config = dataclasses.replace(CONFIGS["a denoiser"], clip_denoised=True, tuned_sigmas=())
    assert restored(tmp_path / "model.pt", "openai", config) == dataclasses.replace(config, label_dropout=None)
    assert unstated("openai", config).report() == (
        "To read it, give --preconditioning edm --image-size 16 --head-dim 16 --num-levels 18 --class-names FILE "
        "--tuned-timesteps 8,0.\nIt does not contain: label dropout."
    )


@pytest.mark.parametrize("kind", ["openai", "diffusers"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "edm"}, "the variant edm"),
        ({"augment_dim": 9, "uncertainty": True}, "augmentation parameters or an uncertainty head"),
        ({"output_channels": 6}, "other output channels than image channels"),
    ],
)
def test_networks_that_pytorch_formats_lack_are_refused(kind, fields, message, tmp_path):
    network = dataclasses.replace(SMALL, **fields)
    with pytest.raises(InputError, match=f"format has no networks with {message}; use --to native"):
        write(tmp_path / "model.pt", kind, ModelConfig(network, EDMPreconditioning()), random_params(network))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("openai", {"clip_denoised": False}, "samples that are not clipped"),
        ("openai", {"tuned_sigmas": ((80.0, 0.8),)}, "tuned sigmas"),
        ("diffusers", {"schedule": KarrasSchedule(0.01)}, "other sigma_data"),
        ("diffusers", {"preconditioning": EDMPreconditioning(0.6)}, "other sigma_data"),
        ("diffusers", {"preconditioning": ConsistencyPreconditioning(), "consistency": False}, "a denoiser with the"),
        ("diffusers", {"latents": Latents("vae", (1.0,) * 3, (0.0,) * 3)}, "a model of latents"),
        ("openai", {"latents": Latents("vae", (1.0,) * 3, (0.0,) * 3)}, "a model of latents"),
    ],
)
def test_settings_that_pytorch_formats_lack_are_refused(kind, changes, message, tmp_path):
    config = dataclasses.replace(ModelConfig(SMALL, EDMPreconditioning()), **changes)
    with pytest.raises(InputError, match=f"The {kind} format cannot represent {message}"):
        write(tmp_path / "model.pt", kind, config, random_params(SMALL))
    assert not list(tmp_path.iterdir())


def test_the_check_refuses_networks_that_diffusers_lacks():
    network = dataclasses.replace(SMALL, augment_dim=9)
    source = Source(Path(), ModelConfig(network, EDMPreconditioning()), random_params(network))
    with pytest.raises(InputError, match=r"leave out --check.*augmentation parameters"):
        compare(source)


def test_parameters_without_a_rule_are_not_dropped():
    params = random_params(SMALL) | {"more": {"kernel": np.zeros((2, 2))}}
    with pytest.raises(AssertionError, match="the rules do not cover the parameters"):
        to_source(OPENAI.rules(SMALL), params)


def test_a_table_of_classes_becomes_the_linear_layer_of_edm(tmp_path):
    config = ModelConfig(dataclasses.replace(SONG, label_embedding="table"), EDM)
    params = random_params(config.network)
    write(tmp_path / "edm.safetensors", "edm", config, params)
    found = read(tmp_path / "edm.safetensors", CheckpointHints(**unstated("edm", config).hints))
    assert found.config == dataclasses.replace(config, network=SONG, clip_denoised=False)
    given = jnp.ones((3, *SONG.image_shape)), jnp.array([0.1, 1.0, 80.0]), jnp.arange(3)
    expected, restored = (
        jax.jit(each.function)(own, *given) for each, own in ((config, params), (found.config, found.params))
    )
    np.testing.assert_allclose(restored, expected, rtol=1e-5, atol=1e-5)
