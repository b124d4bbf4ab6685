"""Parameters as dictionaries of other programs: there and back without a change."""

import dataclasses

import flax.core
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import params_from_flax, state_dict
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.types import leaves, nested
from tests.laws.test_single_file import NETWORK
from tests.support import SMALL, assert_bitwise_equal, random_params

TINY = dataclasses.replace(SMALL, image_size=8, channel_mult=(1,), attention_factors=(), classes=3)
PARAMS = random_params(TINY)
FLAT = {name: np.asarray(leaf) for name, leaf in leaves(PARAMS)}


@pytest.mark.parametrize(
    "variables",
    [
        PARAMS,
        {"params": PARAMS},
        flax.core.freeze({"params": PARAMS}),
        FLAT,
        {name.replace("/", "."): jnp.asarray(leaf) for name, leaf in FLAT.items()},
        flax.traverse_util.flatten_dict(PARAMS),
    ],
    ids=["parameters", "variables", "frozen", "paths", "dots", "tuples"],
)
def test_dictionaries_of_every_kind_are_read(variables):
    assert_bitwise_equal(dict(leaves(params_from_flax(TINY, variables))), FLAT)


@pytest.mark.usefixtures("unchecked_types")
def test_all_wrong_arrays_are_named():
    wrong = dict(FLAT)
    wrong["more/kernel"] = wrong.pop("stem/kernel")
    wrong["stem/bias"] = wrong["stem/bias"].astype(int)
    name = max(FLAT)
    wrong[name] = wrong[name][:1]
    with pytest.raises(InputError) as raised:
        params_from_flax(TINY, wrong)
    message = str(raised.value)
    for part in (
        "4 disagree",
        "missing: stem/kernel",
        "not part of the network: more",
        "numbers: stem/bias",
        max(FLAT),
    ):
        assert part in message, part
    with pytest.raises(InputError, match="Expected a dictionary"):
        params_from_flax(TINY, [1])


def test_state_dicts_are_those_of_the_written_files(tmp_path):
    config = ModelConfig(TINY, ConsistencyPreconditioning(), num_levels=18)
    song = ModelConfig(dataclasses.replace(NETWORK, classes=None), EDMPreconditioning(time_factor=0.25))
    conversion.write(tmp_path / "out", "diffusers", config, PARAMS)
    written = safetensors.numpy.load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_bitwise_equal(state_dict("diffusers", config, PARAMS), written)
    params = random_params(song.network)
    conversion.write(tmp_path / "edm.safetensors", "edm", song, params)
    written = safetensors.numpy.load_file(tmp_path / "edm.safetensors")
    assert_bitwise_equal(state_dict("edm", song, params), written)
    assert_bitwise_equal(dict(leaves(nested(state_dict("native", config, PARAMS)))), FLAT)
    with pytest.raises(InputError, match="got 'onnx'"):
        state_dict("onnx", config, PARAMS)
