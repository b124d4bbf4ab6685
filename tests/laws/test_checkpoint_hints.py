"""Tuned noise levels when options change the noise range or give other levels."""

import dataclasses

import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import CheckpointHints, read, state_dict, write
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.io.safetensors import write_safetensors
from cm_jax.networks import SongUNet
from tests.support import random_params

NETWORK = SongUNet(8, base_channels=8, channel_mult=(1, 2), blocks_per_level=1, attention_factors=())
CONFIG = ModelConfig(
    NETWORK,
    EDMPreconditioning(time_factor=0.25),
    tuned_timesteps=((30, 20, 0),),
    tuned_sigmas=((80.0, 0.821), (80.0, 2.0, 0.5, 0.002)),
    clip_denoised=False,
    consistency=True,
)
TWO, FOUR = CONFIG.tuned_sigmas


@pytest.mark.parametrize(
    ("hints", "timesteps", "sigmas"),
    [
        ({}, ((30, 20, 0),), (TWO, FOUR)),
        ({"sigma_max": 40.0}, (), ()),
        ({"sigma_max": 160.0}, (), ()),
        ({"sigma_min": 0.003}, (), (TWO,)),
        ({"rho": 5.0}, (), (TWO, FOUR)),
        ({"tuned_timesteps": ((22, 0),)}, ((22, 0),), (FOUR,)),
        ({"tuned_timesteps": ((22, 0),), "sigma_max": 40.0}, ((22, 0),), ()),
    ],
)
def test_tuned_levels_that_do_not_fit_the_options_are_dropped(hints, timesteps, sigmas, tmp_path):
    changed = CheckpointHints(**hints).apply(CONFIG)
    assert (changed.tuned_timesteps, changed.tuned_sigmas) == (timesteps, sigmas)
    write(tmp_path / "native", "native", CONFIG, random_params(NETWORK))
    assert read(tmp_path / "native", CheckpointHints(**hints)).config == changed


def test_dropped_levels_of_a_state_dict_are_noted(tmp_path):
    path, hints = tmp_path / "edm.safetensors", CheckpointHints(preconditioning="edm-consistency")
    write_safetensors(path, state_dict("edm", CONFIG, random_params(NETWORK)), {})
    found = read(path, hints)
    assert found.config.tuned_sigmas == (TWO,)
    other = read(path, dataclasses.replace(hints, tuned_timesteps=((22, 0),)))
    assert (other.config.tuned_timesteps, other.config.tuned_sigmas) == (((22, 0),), ())
    note = "Dropped the tuned noise levels 80.0,0.821: the options replace them or do not fit them."
    assert other.notes == (*found.notes, note)
    assert read(path, dataclasses.replace(hints, sigma_max=40.0)).notes == other.notes
