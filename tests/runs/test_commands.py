"""The commands as a user runs them, on good input and on bad."""

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

import cm_jax
from cm_jax import conversion, kernels
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main, main_convert, main_sample
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.diffusers import DIFFUSERS
from cm_jax.conversion.parity import compare
from cm_jax.conversion.rules import to_source
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.io.safetensors import LazyTensor
from cm_jax.model import Model
from tests.support import DATA, EMOJI, ROOT, SMALL, random_params, run

GOLDEN = DATA / "openai" / "adm_unconditional.pt"
TOLD = ("--image-size", "16", "--head-dim", "32", "--preconditioning", "consistency", "--num-levels", "40")


def failed(capsys, command, *arguments):
    """The error message of a command that must exit with status 2."""
    with pytest.raises(SystemExit) as stopped:
        command(list(map(str, arguments)))
    output = capsys.readouterr()
    assert stopped.value.code == 2, output
    assert "Traceback" not in output.err
    assert output.err.count("error: ") == 1 or "For full helptext" in output.err
    assert "Sampling" not in output.out
    return output.err


def succeeded(capsys, command, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command(list(map(str, arguments)))
    output = capsys.readouterr()
    assert stopped.value.code == 0, output.err
    return output.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model as a diffusers folder."""
    path = tmp_path_factory.mktemp("diffusers") / "diffusers-mine"
    source = read(EMOJI)
    conversion.write(path, "diffusers", source.config, source.params)
    return path


def test_convert_and_sample_from_the_shell(tmp_path):
    """The two commands of the demo, in processes of their own."""
    converted = run("-m", "convert", str(EMOJI), str(tmp_path / "emoji"), "--check")
    assert converted.returncode == 0, converted.stderr
    assert "within the bound" in converted.stdout
    sampled = run(
        "sample.py", str(tmp_path / "emoji"), "--labels", "all", "--count", "18", "--output", str(tmp_path / "a.png")
    )
    assert sampled.returncode == 0, sampled.stderr
    assert "Sampled 18 images" in sampled.stdout
    assert Image.open(tmp_path / "a.png").size[1] == 9 * 66 + 2


def test_bad_input_from_the_shell_has_no_traceback(tmp_path):
    done = run("sample.py", str(tmp_path / "nothing.pt"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no checkpoint")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_the_same_image_with_two_devices_and_a_warm_cache(tmp_path):
    network = dataclasses.replace(SMALL, image_size=8, channel_mult=(1,), attention_factors=())
    Model(ModelConfig(network, ConsistencyPreconditioning(), num_levels=18), random_params(network)).save(
        tmp_path / "small"
    )
    arguments = (
        "sample.py",
        str(tmp_path / "small"),
        "--count",
        "3",
        "--steps",
        "2",
        "--compilation-cache",
        str(tmp_path / "cache"),
        "--output",
    )
    assert run(*arguments, str(tmp_path / "one.npz")).returncode == 0
    assert any((tmp_path / "cache").iterdir())
    run(*arguments, str(tmp_path / "two.npz"), JAX_NUM_CPU_DEVICES="2")
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


def test_npz_is_what_the_evaluator_reads(tmp_path, capsys):
    succeeded(capsys, main_sample, "emoji16_cd", "--count", 5, "--labels", "Flags", "--output", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["arr_0"].shape == (5, 16, 16, 3)
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].dtype == np.int64
        assert archive["arr_1"].tolist() == [8] * 5


def test_a_folder_of_images_and_truncation(tmp_path, capsys):
    for how in ("round", "truncate"):
        asked = ("--count", 2, "--labels", "3", "--quantization", how, "--output", tmp_path / how)
        succeeded(capsys, main_sample, "emoji16_cd", *asked)
    names = sorted(path.name for path in (tmp_path / "round").iterdir())
    assert names == ["000000_class3.png", "000001_class3.png"]
    rounded, truncated = (
        np.asarray(Image.open(tmp_path / how / names[0])).astype(int) for how in ("round", "truncate")
    )
    assert set(np.unique(rounded - truncated)) == {0, 1}


@pytest.mark.parametrize(
    "how", [("--steps", "2"), ("--timesteps", "8,0"), ("--indices", "0,8,17"), ("--sigmas", "80,3.256821519765537")]
)
def test_all_noise_level_options_give_the_same_images(tmp_path, capsys, how):
    said = succeeded(capsys, main_sample, "emoji16_cd", "--count", 2, *how, "--output", tmp_path / "s.npz")
    assert "consistency sampler in 2 steps (sigma 80, 3.257)" in said
    expected = cm_jax.load("emoji16_cd").sample(0, 2, timesteps=(8, 0))
    pixels = np.load(tmp_path / "s.npz")["arr_0"]
    assert np.abs(pixels - np.clip((expected + 1) * 127.5, 0, 255)).max() < 0.51


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


class Payload:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def poisoned(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Payload()}))


def nested(path):
    torch.save({"model": {"a": torch.zeros(2)}, "step": 3}, path)


def other_network(path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)


def outside(path):
    """A tensor whose strides reach outside of its storage."""
    good = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2, 2)}, good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as damaged:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"K\x02K\x02\x86", b"K\x09K\x09\x86", 1)
            damaged.writestr(entry.filename, content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(GOLDEN.read_bytes()[:100_000]), "not a complete file"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "not a complete file"),
        (lambda path: path.write_bytes(pickle.dumps({"x": Payload()})), "not a complete file"),
        (poisoned, r"runs posix.system when it is read"),
        (nested, "Expected one state dict"),
        (other_network, "an ADM U-Net in the"),
        (outside, "outside its storage"),
    ],
    ids=["empty", "truncated", "html", "bare_pickle", "poisoned", "nested", "other_network", "outside"],
)
def test_files_that_are_no_checkpoints(tmp_path, capsys, make, message):
    make(tmp_path / "cd_imagenet64_l2.pt")
    said = failed(capsys, main_convert, tmp_path / "cd_imagenet64_l2.pt", tmp_path / "out")
    assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cd_imagenet64_l2.pt"]
    assert not (ROOT / "PWNED").exists()


def test_files_damaged_at_random_are_read_or_refused(tmp_path):
    """A hundred copies, each cut off or with bytes of its archive or of its pickle replaced: never any other error."""
    content, dice = (DATA / "openai" / "adm_class_cond.pt").read_bytes(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    description = next(name for name in entries if name.endswith("data.pkl"))

    def scattered(data):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 3, 30])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        return bytes(damaged)

    path, refused = tmp_path / "model.pt", 0
    for attempt in range(100):
        if attempt % 3 == 0:
            path.write_bytes(content[: dice.randrange(len(content))])
        elif attempt % 3 == 1:
            path.write_bytes(scattered(content))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in entries.items():
                    archive.writestr(name, scattered(data) if name == description else data)
        try:
            read(path, CheckpointHints(16, None, "consistency", 40, 16))
        except InputError:
            refused += 1
    assert refused > 80


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path, capsys):
    content = bytearray(EMOJI.read_bytes())
    content[2_000_000] ^= 1
    (tmp_path / "emoji16_cd.pt").write_bytes(content)
    assert "is damaged" in failed(capsys, main_convert, tmp_path / "emoji16_cd.pt", tmp_path / "out")


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
        (lambda unet: rewrite(unet, attention_head_dim=48), "do not split"),
        (lambda unet: rewrite(unet, sample_size=15), "multiple of 4"),
        (lambda unet: rewrite(unet, sample_size="16"), 'sample_size must be a whole number, got "16"'),
        (lambda unet: rewrite(unet, attention_head_dim=[32]), "attention_head_dim must be a whole number"),
        (lambda unet: rewrite(unet, _class_name="UNet2DConditionModel"), "expected _class_name"),
        (lambda unet: rewrite(unet, time_embedding_dim=7), "contradicts"),
        (lambda unet: rewrite_scheduler(unet, num_train_timesteps=None), "num_train_timesteps must be a whole number"),
        (lambda unet: rewrite_scheduler(unet, _class_name="DDPMScheduler"), "expected _class_name"),
        (lambda unet: rewrite_scheduler(unet, clip_denoised=False), "expected clip_denoised true, got false"),
        (lambda unet: spoil(unet, np.nan), "not a number"),
    ],
)
def test_diffusers_folders_that_contradict_themselves(folder, tmp_path, capsys, edit, message):
    broken = broken_folder(folder, tmp_path, edit)
    assert message in failed(capsys, main_sample, broken, "--output", tmp_path / "s.png")
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cd_imagenet64_lpips",), "download https://"),
        (("emoji16",), "Did you mean 'emoji16_cd'?"),
        (("--count", 0), "count must be"),
        (("--count", 10, "--labels", "1,2,3"), "use --count 9"),
        (("--labels", "9"), "from 0 to 8"),
        (("--labels", "Flagz"), "did you mean 'Flags'?"),
        (("--timesteps", "0,8"), "must descend to 0"),
        (("--timesteps", "40,0"), "0 to 39"),
        (("--timesteps", "8;0"), "whole numbers separated by commas"),
        (("--timesteps", "8,0", "--steps", 2), "steps and timesteps"),
        (("--indices", "0,8"), "end with 39"),
        (("--sigmas", "80,-1"), "greater than 0.002"),
        (("--steps", 0), "from 1 to 10000"),
        (("--seed", -1), "A seed must be"),
        (("--seed", 2**32), "A seed must be"),
        (("--labels", "1,,2"), "no class ''"),
        (("--sigmas", "1e39"), "must be finite"),
        (("/dev/null",), "There is no checkpoint"),
        (("x" * 300,), "cannot be a path"),
        (("~nosuchuser/x.pt",), "cannot be a path"),
        (("--batch-size", 0), "batch_size must be"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, capsys, arguments, message):
    assert message in failed(capsys, main_sample, *arguments, "--output", tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_more_images_than_can_be_counted(tmp_path, capsys):
    assert "count must be" in failed(capsys, main_sample, "--count", 10**12, "--output", tmp_path / "folder")
    assert "is too large" in failed(capsys, main_sample, "--count", 10**12, "--output", tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_labels_for_an_unconditional_model(tmp_path, capsys):
    succeeded(capsys, main_convert, GOLDEN, tmp_path / "m", *TOLD)
    assert "unconditional" in failed(capsys, main_sample, tmp_path / "m", "--labels", 1, "--output", tmp_path / "s.png")


def test_outputs_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert "Cannot write" in failed(capsys, main_sample, "--output", tmp_path / "file" / "s.png")
    assert "files in it" in failed(capsys, main_sample, "--output", tmp_path / "full")
    assert ".jpg files are not supported" in failed(capsys, main_sample, "--output", tmp_path / "s.jpg")
    assert "too large" in failed(capsys, main_sample, "--count", 50_000, "--output", tmp_path / "s.png")
    assert "nope" in failed(capsys, main_sample, "--labels", "nope", "--output", tmp_path / "deep" / "s.png")
    assert not (tmp_path / "deep").exists()
    assert "is not a folder" in failed(capsys, main_sample, "--output", tmp_path / "file")
    assert "from 2 to" in failed(capsys, main_convert, EMOJI, tmp_path / "new", "--num-levels", 0)
    assert "exists already" in failed(capsys, main_convert, EMOJI, tmp_path / "full")
    assert "--to native writes a folder" in failed(capsys, main_convert, EMOJI, tmp_path / "x.pt", "--to", "native")


def test_a_closed_pipe_ends_a_command_quietly():
    """As in `cm-jax sample --help | head -1`."""
    for words in (["sample.py", "--help"], ["train.py", "emoji32-edm", "--help"], ["edit.py", "--help"]):
        command = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        command.stdout.close()
        assert command.stderr.read() == ""
        assert command.wait() == 141
        command.stderr.close()


def test_the_first_compilation_of_the_kernels_is_reported(tmp_path):
    arguments = ("sample.py", "emoji16_cd", "--count", "1", "--output", str(tmp_path / "s.npz"))
    first, second = (run(*arguments, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    if not kernels.available():
        return
    assert "Compiling the CPU kernels" in first.stderr
    assert "Compiled 4 of 4 files." in first.stderr
    assert "ompil" not in second.stderr
