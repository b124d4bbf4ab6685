"""Models in one safetensors file: bitwise round trip, and damaged files are refused."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main_convert
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.loading import load
from cm_jax.networks import SongUNet
from cm_jax.types import leaves
from tests.runs.test_commands import failed, succeeded
from tests.support import EMOJI, assert_bitwise_equal, random_params

NETWORK = SongUNet(
    image_size=8, base_channels=8, channel_mult=(1, 2), blocks_per_level=1, attention_factors=(), classes=3
)
CONFIG = ModelConfig(
    NETWORK,
    EDMPreconditioning(time_factor=0.25),
    num_levels=9,
    class_names=("a", "b", "c"),
    tuned_timesteps=((4, 0),),
    consistency=True,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    conversion.write(path, "native", CONFIG, random_params(NETWORK))
    return path


def parts(path):
    """Tensors and metadata of a file."""
    with safetensors.safe_open(path, framework="np") as archive:
        return safetensors.numpy.load_file(path), archive.metadata()


def test_round_trip_is_bitwise(file):
    source = conversion.read(file)
    assert source.config == CONFIG
    expected = {name: np.asarray(leaf) for name, leaf in leaves(random_params(NETWORK))}
    assert_bitwise_equal(dict(leaves(source.params)), expected)
    assert set(parts(file)[0]) == set(expected), "tensors are named by their paths"


def test_permissions_are_those_of_any_new_file(file, tmp_path):
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_float16_files_are_loaded_in_float32(tmp_path, capsys):
    succeeded(capsys, main_convert, EMOJI, tmp_path / "folder")
    said = succeeded(capsys, main_convert, tmp_path / "folder", tmp_path / "half.safetensors", "--fp16")
    assert "cm-jax sample" in said
    half, whole = load(tmp_path / "half.safetensors"), load(EMOJI)
    assert half.config == whole.config, "levels and class names are kept"
    for (name, loaded), (_, original) in zip(sorted(leaves(half.params)), sorted(leaves(whole.params)), strict=True):
        assert loaded.dtype == np.float32, name
        np.testing.assert_array_equal(loaded, np.float32(np.float16(original)))


def test_values_outside_float16_are_refused(file, tmp_path, capsys):
    params = random_params(NETWORK)
    params["stem"]["bias"] = np.full_like(params["stem"]["bias"], 1e5)
    conversion.write(file, "native", CONFIG, params)
    message = failed(capsys, main_convert, file, tmp_path / "half.safetensors", "--fp16")
    assert "Expected values in [-65504, 65504] for float16, got larger ones in stem/bias" in message
    assert not (tmp_path / "half.safetensors").exists()


def test_flipped_bits_and_truncation_are_detected(file):
    """In the header, the metadata and the data."""
    whole = file.read_bytes()
    dice = np.random.default_rng(0)
    for place in dice.integers(len(whole), size=30):
        mutated = bytearray(whole)
        mutated[place] ^= 1 << int(dice.integers(8))
        file.write_bytes(mutated)
        try:
            source = conversion.read(file)
        except InputError:
            continue
        assert source.config == CONFIG, "spaces and escapes in the header may change without effect"
        assert all(
            np.array_equal(*pair) for pair in zip(*map(_numbers, (source.params, random_params(NETWORK))), strict=True)
        )
    for length in dice.integers(len(whole), size=6):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError):
            conversion.read(file)


def _numbers(params):
    return [np.asarray(leaf) for _, leaf in sorted(leaves(params))]


def test_a_config_that_contradicts_the_tensors_is_refused(file):
    tensors, metadata = parts(file)
    other = dataclasses.replace(CONFIG, network=dataclasses.replace(NETWORK, base_channels=16))
    safetensors.numpy.save_file(tensors, file, metadata | {"cm_jax": other.to_json()})
    with pytest.raises(InputError, match="wrong shape: down_0_0/residual/conv_1/bias is \\[8\\]"):
        conversion.read(file)
    safetensors.numpy.save_file(tensors, file, metadata | {"cm_jax": json.dumps({"format": 99})})
    with pytest.raises(InputError, match="format 99"):
        conversion.read(file)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(InputError, match=r"\.safetensors"):
        conversion.read(file)


def test_an_existing_file_is_replaced_and_a_folder_is_not(file, tmp_path, capsys):
    succeeded(capsys, main_convert, EMOJI, file)
    assert load(file).config == load(EMOJI).config
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder.safetensors" / "kept").touch()
    failed(capsys, main_convert, EMOJI, tmp_path / "folder.safetensors")
    assert (tmp_path / "folder.safetensors" / "kept").exists()
