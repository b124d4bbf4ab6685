"""The convert command and the checkpoint files it reads, on good input and on bad."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

import cm_jax
from cm_jax import conversion
from cm_jax.cli import main, main_convert, main_sample
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.parity import compare
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.unet_format import DIFFUSERS
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.io.safetensors import LazyTensor
from tests.runs.test_commands import failed, succeeded
from tests.support import DATA, EMOJI

GOLDEN = DATA / "openai" / "adm_unconditional.pt"
TOLD = ("--image-size", "16", "--head-dim", "32", "--preconditioning", "consistency", "--num-levels", "40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model as a diffusers folder."""
    path = tmp_path_factory.mktemp("diffusers") / "diffusers-mine"
    source = read(EMOJI)
    conversion.write(path, "diffusers", source.config, source.params)
    return path


def test_sampling_straight_from_a_diffusers_folder(folder, tmp_path, capsys):
    succeeded(capsys, main, "sample", folder, "--count", 2, "--output", tmp_path / "theirs.npz")
    succeeded(capsys, main, "sample", "emoji16_cd", "--count", 2, "--output", tmp_path / "ours.npz")
    theirs, ours = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("theirs", "ours"))
    np.testing.assert_array_equal(theirs, ours)


def test_conversions_in_a_circle(tmp_path, capsys):
    """.pt -> diffusers -> ours -> .pt, and PyTorch reads the same numbers."""
    stops = [EMOJI, tmp_path / "emoji16_cd_diffusers", tmp_path / "emoji16_cd_ours", tmp_path / "emoji16_cd.pt"]
    kinds = ["diffusers", "native", "openai"]
    for source, destination, kind in zip(stops, stops[1:], kinds, strict=False):
        succeeded(capsys, main_convert, source, destination, "--to", kind)
    before, after = (torch.load(path, weights_only=True) for path in (stops[0], stops[-1]))
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        assert tensor.dtype == after[name].dtype


def test_other_levels_forget_the_tuned_ones_and_other_clocks_are_not_exported(tmp_path, capsys):
    succeeded(capsys, main_convert, EMOJI, tmp_path / "ours", "--num-levels", 5)
    source = read(tmp_path / "ours")
    assert source.config.num_levels == 5
    succeeded(capsys, main_convert, tmp_path / "ours", tmp_path / "again", "--num-levels", 9)
    assert read(tmp_path / "again").config.tuned_timesteps == ()
    config = dataclasses.replace(source.config, preconditioning=ConsistencyPreconditioning(time_factor=0.25))
    for kind, name in (("diffusers", "d"), ("openai", "o.pt")):
        with pytest.raises(InputError, match=r"cannot represent c_noise = 0\.25 ln sigma"):
            conversion.write(tmp_path / name, kind, config, source.params)


def test_a_teacher_becomes_a_network_without_a_pipeline(tmp_path, capsys):
    told = (*TOLD[:5], "edm")
    said = succeeded(capsys, main_convert, GOLDEN, tmp_path / "d", "--to", "diffusers", *told)
    assert "without a pipeline" in said
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["unet"]
    assert (
        read(tmp_path / "d", CheckpointHints(preconditioning="edm")).config.network
        == read(GOLDEN, CheckpointHints(32, None, "edm", 40, 16)).config.network
    )


def test_bin_files_and_old_configs(folder, tmp_path):
    """A folder of 2023: weights as .bin, and a config that leaves most keys out."""
    old = tmp_path / "emoji16_cd"
    shutil.copytree(folder, old)
    weights = old / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(weights).items()}
    torch.save(tensors, weights.with_suffix(".bin"))
    weights.unlink()
    config = json.loads((old / "unet" / "config.json").read_text())
    kept = ("sample_size", "attention_head_dim", "block_out_channels", "down_block_types", "num_class_embeds")
    (old / "unet" / "config.json").write_text(json.dumps({key: config[key] for key in kept}))
    source = read(old)
    assert source.config == read(EMOJI).config
    assert all(np.array_equal(tensors[name].numpy(), tensor.read()) for name, tensor in source.tensors.items())


def test_hints_that_shapes_do_not_determine_are_requested_together(tmp_path, capsys):
    message = failed(capsys, main_convert, GOLDEN, tmp_path / "m")
    for flag in ("--image-size", "--head-dim", "--preconditioning", "--num-levels"):
        assert flag in message
    succeeded(capsys, main_convert, GOLDEN, tmp_path / "m", *TOLD)


def test_labels_for_an_unconditional_model(tmp_path, capsys):
    succeeded(capsys, main_convert, GOLDEN, tmp_path / "m", *TOLD)
    assert "unconditional" in failed(capsys, main_sample, tmp_path / "m", "--labels", 1, "--output", tmp_path / "s.png")


def test_a_published_name_on_another_network_tells_nothing(tmp_path, capsys):
    shutil.copy(EMOJI, tmp_path / "cd_imagenet64_l2_mine.pt")
    message = failed(capsys, main_convert, tmp_path / "cd_imagenet64_l2_mine.pt", tmp_path / "m")
    assert "(it has 1,923,907 parameters, not 295,899,267)" in message
    assert "--head-dim" in message


def test_hints_that_override_a_checkpoint_are_reported(tmp_path, capsys):
    ours = tmp_path / "ours"
    succeeded(capsys, main_convert, EMOJI, ours)
    said = succeeded(
        capsys, main_convert, ours, tmp_path / "m.safetensors", "--preconditioning", "edm", "--num-levels", 40
    )
    for change in (
        "num_levels: 18 in the checkpoint, 40 now",
        "preconditioning: ConsistencyPreconditioning in the checkpoint",
    ):
        assert change in said
    again = tmp_path / "again.safetensors"
    assert "Overridden" not in succeeded(
        capsys, main_convert, tmp_path / "m.safetensors", again, "--preconditioning", "edm"
    )


def test_our_own_checkpoint_knows_its_heads(tmp_path, capsys):
    succeeded(capsys, main_convert, EMOJI, tmp_path / "ours")
    message = failed(capsys, main_convert, tmp_path / "ours", tmp_path / "m", "--head-dim", 64)
    assert "Expected head_dim 32 and heads None" in message
    succeeded(capsys, main_convert, tmp_path / "ours", tmp_path / "m", "--head-dim", 32)


def test_the_check_names_the_unit_that_differs():
    source = read(EMOJI)
    parity = compare(source)
    assert parity.passed
    assert not parity.units
    wrong = compare_with_damage(source)
    assert not wrong.passed
    bad = [name for name, value in wrong.units.items() if value > 1e-5]
    assert bad[0] == "down_1_0/residual"
    assert "down_1_0/residual" in wrong.report()


def compare_with_damage(source):
    """The check, where the JAX side has lost a bias that the PyTorch side has."""
    arrays = to_source(DIFFUSERS.rules(source.config.network), source.params)
    tensors = {name: LazyTensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    layer = source.params["down_1_0"]["residual"]["conv_2"]
    layer["bias"] = layer["bias"] + np.float16(0.1)
    return compare(dataclasses.replace(source, format=DIFFUSERS, tensors=tensors))


def test_missing_extra_and_misshapen_tensors_in_one_message(tmp_path, capsys):
    tensors = dict(torch.load(EMOJI, weights_only=True))
    del tensors["middle_block.1.qkv.bias"]
    tensors["out.0.weight"] = torch.zeros(5)
    tensors["ema.decay"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "emoji16_cd.pt")
    message = failed(capsys, main_convert, tmp_path / "emoji16_cd.pt", tmp_path / "out")
    assert "missing: middle_block.1.qkv.bias [192]" in message
    assert "wrong shape: out.0.weight is [5], the architecture needs [32]" in message
    assert "not part of the network: ema.decay [1]" in message


def test_other_group_norms_of_diffusers_agree_with_diffusers(folder, tmp_path, capsys):
    """norm_num_groups and norm_eps change the images and no tensor; the check compares with UNet2DModel itself."""
    copy = broken_folder(
        folder, tmp_path, lambda unet: rewrite(unet, norm_num_groups=8, norm_eps=1e-2, attn_norm_num_groups=None)
    )
    succeeded(capsys, main_convert, copy, tmp_path / "native", "--check")
    network = cm_jax.load(tmp_path / "native").config.network
    assert (network.norm_groups, network.norm_epsilon) == (8, 0.01)
    succeeded(capsys, main_convert, tmp_path / "native", tmp_path / "again", "--to", "diffusers")
    config = json.loads((tmp_path / "again" / "unet" / "config.json").read_text())
    assert (config["norm_num_groups"], config["norm_eps"], config["attn_norm_num_groups"]) == (8, 0.01, 8)
    plain, other = (cm_jax.load(path).sample(0, 1, labels=0) for path in (folder, copy))
    assert np.abs(plain - other).max() > 0.01
    assert "other group norms" in failed(capsys, main_convert, copy, tmp_path / "x.pt", "--to", "openai")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("openai", "out.safetensors", ".pt or .pth or .bin for --to openai, but out.safetensors ends in .safetensors"),
        ("openai", "out", "for --to openai, but out has no suffix: rename it"),
        ("edm", "out.npz", ".pt or .pth or .bin or .safetensors for --to edm, but out.npz ends in .npz"),
        ("native", "out.pth", "out.pth looks like a file, and --to native writes a folder"),
    ],
)
def test_names_of_files_of_another_format_are_refused(tmp_path, capsys, kind, name, message):
    assert message in failed(capsys, main_convert, EMOJI, tmp_path / name, "--to", kind)
    if kind == "openai":
        source = read(EMOJI)
        with pytest.raises(InputError, match="for --to openai"):
            conversion.write(tmp_path / name, kind, source.config, source.params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_other_suffixes_of_pytorch(tmp_path, capsys, suffix):
    assert "--head-dim 32" in succeeded(capsys, main_convert, EMOJI, tmp_path / f"emoji16_cd{suffix}", "--to", "openai")
    assert read(tmp_path / f"emoji16_cd{suffix}").config == read(EMOJI).config


def broken_folder(folder, tmp_path, edit):
    copy = tmp_path / "emoji16_cd"
    shutil.copytree(folder, copy)
    edit(copy / "unet")
    return copy


def rewrite(unet, **fields):
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | fields))


def rewrite_scheduler(unet, **fields):
    path = unet.parent / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil(unet, factor):
    path = unet / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] * np.float16(factor)}, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda unet: (unet / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
        (
            lambda unet: (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 50),
            "not a complete safetensors",
        ),
        (lambda unet: (unet / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda unet: (unet / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda unet: rewrite(unet, block_out_channels=[64, 64, 64]), "contradicts the weights"),
        (
            lambda unet: rewrite(unet, num_class_embeds=1000),
            "num_class_embeds: expected 9, got 1000",
        ),
        (lambda unet: rewrite(unet, resnet_time_scale_shift="default"), "contradicts"),
        (lambda unet: rewrite(unet, act_fn="gelu"), 'act_fn: expected "silu", got "gelu"'),
        (
            lambda unet: rewrite(unet, norm_num_groups=16, attn_norm_num_groups=32),
            "not supported:\n  attn_norm_num_groups: expected 16, got 32",
        ),
        (lambda unet: rewrite(unet, norm_eps="small"), "norm_eps must be a finite number"),
        (lambda unet: rewrite(unet, class_embed_type="timestep"), 'class_embed_type: expected null, got "timestep"'),
        (lambda unet: rewrite(unet, attention_head_dim=48), "do not split"),
        (lambda unet: rewrite(unet, sample_size=15), "multiple of 4"),
        (lambda unet: rewrite(unet, sample_size="16"), 'sample_size must be a whole number, got "16"'),
        (lambda unet: rewrite(unet, attention_head_dim=[32]), "attention_head_dim must be a whole number"),
        (lambda unet: rewrite(unet, _class_name="UNet2DConditionModel"), "expected _class_name"),
        (lambda unet: rewrite(unet, time_embedding_dim=7), "contradicts"),
        (lambda unet: rewrite_scheduler(unet, num_train_timesteps=None), "num_train_timesteps must be a whole number"),
        (lambda unet: rewrite_scheduler(unet, _class_name="DDPMScheduler"), "expected _class_name"),
        (lambda unet: rewrite_scheduler(unet, clip_denoised=0), "clip_denoised must be true or false, got 0"),
        (lambda unet: spoil(unet, np.nan), "not a number"),
    ],
)
def test_diffusers_folders_that_contradict_themselves(folder, tmp_path, capsys, edit, message):
    broken = broken_folder(folder, tmp_path, edit)
    assert message in failed(capsys, main_sample, broken, "--output", tmp_path / "s.png")
    assert not (tmp_path / "s.png").exists()
