"""Files of third-party formats: reading them restores the function, with the hints that `unstated` names, or they are
not written.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import CheckpointHints, read, unstated, write
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
