"""Pipeline folders of diffusers as they come, and settings that tensors do not determine."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch

from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main_convert
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.unet_format import DIFFUSERS
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, VPPreconditioning
from cm_jax.errors import InputError
from tests.runs.test_commands import failed, succeeded
from tests.runs.test_wrapped_checkpoints import (
    DIFFUSERS_MODEL,
    HINTS,
    MODEL,
    PARAMS,
    SONG,
    TOLD,
    assert_same,
    save,
    tensors_of,
)
from tests.support import EMOJI, SMALL, random_params


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline."""
    path = tmp_path_factory.mktemp("pipeline") / "mine"
    config = ModelConfig(SMALL, ConsistencyPreconditioning(sigma_data=0.4), KarrasSchedule(sigma_max=50.0), 20)
    conversion.write(path, "diffusers", config, PARAMS)
    return path


@pytest.fixture
def copy(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "mine")


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Pipelines


def test_a_key_with_the_name_of_the_folder_chooses_among_the_networks_of_a_file(tmp_path):
    content = {"model": MODEL, "ema": tensors_of(random_params(SMALL, 1))}
    path = save(tmp_path / "model" / "pytorch_model.bin", content)
    for given in (path, path.parent):
        assert_same(read(given, dataclasses.replace(HINTS, key="model")).params, PARAMS)


def test_attention_names_of_early_diffusers_are_renamed(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new, former in old.items():
        tensors = {name.replace(new, former): tensor for name, tensor in tensors.items()}
    assert "mid_block.attentions.0.proj_attn.bias" in tensors
    save(weights, tensors)
    source = read(copy)
    assert_same(source.params, PARAMS)
    assert any("before 0.15" in note for note in source.notes)


def test_the_ema_network_of_a_pipeline_is_preferred(copy):
    shutil.copytree(copy / "unet", copy / "unet_ema")
    save(copy / "unet_ema" / "diffusion_pytorch_model.safetensors", tensors_of(random_params(SMALL, 1), DIFFUSERS))
    source = read(copy)
    assert_same(source.params, random_params(SMALL, 1))
    assert source.notes == ("Read unet_ema; the folder also holds unet (--key unet).",)
    assert_same(read(copy, CheckpointHints(key="unet")).params, PARAMS)
    shutil.rmtree(copy / "unet")
    assert read(copy).notes == ()


@pytest.mark.parametrize("inside", ["unet/diffusion_pytorch_model.safetensors", "unet"])
def test_weights_inside_of_a_pipeline_find_its_settings(copy, inside):
    source = read(copy / inside)
    assert source.config == read(copy).config
    assert source.config.schedule.sigma_max == 50
    assert any("config.json and" in note for note in source.notes) == (inside != "unet")


def test_settings_of_other_programs_are_ignored(tmp_path):
    """A config.json next to a weight file that is not of diffusers."""
    (tmp_path / "config.json").write_text('{"model": "mine"}')
    path = save(tmp_path / "x.safetensors", DIFFUSERS_MODEL)
    assert read(path, HINTS).notes == ()
    with pytest.raises(InputError, match="--image-size"):
        read(path)


def test_a_list_as_sample_size(copy):
    edit_json(copy / "unet" / "config.json", sample_size=[16, 16])
    assert read(copy).config.network.image_shape == (16, 16, 3)
    edit_json(copy / "unet" / "config.json", sample_size=[16, 32])
    assert read(copy).config.network.image_shape == (16, 32, 3)
    edit_json(copy / "unet" / "config.json", sample_size=[16])
    with pytest.raises(InputError, match="a list of 2"):
        read(copy)


def test_json_with_a_byte_order_mark(copy):
    expected = read(copy).config
    for path in (copy / "unet" / "config.json", copy / "scheduler" / "scheduler_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(copy).config == expected


# Settings that tensors do not determine


def test_settings_that_tensors_do_not_determine(tmp_path, capsys):
    path = save(tmp_path / "x.pt", MODEL)
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    flags = ("--sigma-min", 0.01, "--sigma-max", 50, "--rho", 5, "--sigma-data", 0.25, "--time-factor", 100)
    more = ("--class-names", tmp_path / "names.txt", "--tuned-timesteps", "9,0")
    succeeded(capsys, main_convert, path, tmp_path / "out", *TOLD, *flags, *more)
    config = read(tmp_path / "out").config
    assert config.schedule == KarrasSchedule(0.01, 50.0, 5.0)
    assert config.preconditioning == ConsistencyPreconditioning(sigma_data=0.25, time_factor=100.0)
    assert config.class_names[9] == "class 9"
    assert config.tuned_timesteps == ((9, 0),)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sigma-min", 90), "A noise schedule needs 0 < sigma_min < sigma_max"),
        (("--sigma-data", -1), "Expected positive, finite sigma_data"),
        (("--class-names", "missing.txt"), "cannot be read as text"),
        (("--class-names", __file__), "class names for 10 classes"),
        (("--tuned-timesteps", "30,0"), "Expected tuned timesteps"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, capsys, flags, message):
    path = save(tmp_path / "x.pt", MODEL)
    assert message in failed(capsys, main_convert, path, tmp_path / "out", *TOLD, *flags)


def test_another_noise_range_drops_the_tuned_timesteps_of_a_published_checkpoint():
    assert read(EMOJI).config.tuned_timesteps
    assert not read(EMOJI, CheckpointHints(sigma_max=50.0)).config.tuned_timesteps
    with pytest.raises(InputError, match="VPPreconditioning has no sigma_data"):
        CheckpointHints(sigma_data=0.3).apply(ModelConfig(SONG, VPPreconditioning(), consistency=False))
