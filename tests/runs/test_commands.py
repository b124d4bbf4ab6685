"""The commands as a user runs them, on good input and on bad."""

import dataclasses
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax import kernels
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main_convert, main_sample, running
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.io.images import quantize
from cm_jax.model import Model
from tests.support import EMOJI, ROOT, SMALL, random_params, run


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


def test_several_seeds_for_each_label(tmp_path, capsys):
    """A row for each label, a column for each seed."""
    out = tmp_path / "seeds.npz"
    succeeded(capsys, main_sample, EMOJI, "--seeds", "3,8", "--labels", "1,5", "--output", out)
    model = cm_jax.load(EMOJI)
    expected = [model.sample(seed, labels=label) for label in (1, 5) for seed in (3, 8)]
    written = np.load(out)
    np.testing.assert_array_equal(written["arr_1"], [1, 1, 5, 5])
    np.testing.assert_allclose(written["arr_0"], quantize(np.concatenate(expected)), atol=1)
    assert "leave out --count" in failed(capsys, main_sample, EMOJI, "--seeds", "3,8", "--count", "2")


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


def test_labels_as_names_with_commas_lists_and_repeated_options(tmp_path, capsys):
    names = ("lion, Panthera leo", "2", "harp")
    network = dataclasses.replace(SMALL, classes=3)
    config = ModelConfig(network, ConsistencyPreconditioning(), class_names=names)
    Model(config, network.prepare(random_params(network))).save(tmp_path / "model")

    def labels(*texts):
        options = [word for text in texts for word in ("--labels", text)]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        said = succeeded(capsys, main_sample, tmp_path / "model", "--count", 6, *options, "--output", path)
        return said, np.load(path)["arr_1"].tolist()

    assert labels("harp,Lion, panthera leo, 1")[1] == [2, 2, 0, 0, 1, 1]
    assert labels('["lion, Panthera leo", 1]', "harp")[1] == [0, 0, 1, 1, 2, 2]
    said, found = labels("2")
    assert "Label 2 was taken as an index: class 'harp'. The class named '2' has index 1." in said
    assert found == [2] * 6


@pytest.mark.parametrize(
    "how", [("--steps", "2"), ("--timesteps", "8,0"), ("--indices", "0,8,17"), ("--sigmas", "80,3.256821519765537")]
)
def test_all_noise_level_options_give_the_same_images(tmp_path, capsys, how):
    said = succeeded(capsys, main_sample, "emoji16_cd", "--count", 2, *how, "--output", tmp_path / "s.npz")
    assert "consistency sampler in 2 steps (sigma 80, 3.257)" in said
    expected = cm_jax.load("emoji16_cd").sample(0, 2, timesteps=(8, 0))
    pixels = np.load(tmp_path / "s.npz")["arr_0"]
    assert np.abs(pixels - np.clip((expected + 1) * 127.5, 0, 255)).max() < 0.51


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cd_imagenet64_lpips",), "run `cm-jax download cd_imagenet64_lpips`"),
        (("emoji16",), "Did you mean 'emoji16_cd'?"),
        (("--count", 0), "count must be"),
        (("--count", 10, "--labels", "1,2,3"), "use --count 9"),
        (("--labels", "9"), "from 0 to 8"),
        (("--labels", "Flagz"), "did you mean 'Flags'?"),
        (("--labels", "[3"), "expected a JSON list"),
        (("--labels", "Flags", "--labels", "all"), "no class 'all'"),
        (("--timesteps", "0,8"), "must descend to 0"),
        (("--timesteps", "40,0"), "0 to 39"),
        (("--timesteps", "8;0"), "whole numbers separated by commas"),
        (("--timesteps", "8,0", "--steps", 2), "steps and timesteps"),
        (("--indices", "0,8"), "end with 39"),
        (("--sigmas", "80,-1"), "greater than 0 and"),
        (("--steps", 0), "from 1 to 10000"),
        (("--seed", -1), "A seed must be"),
        (("--seed", 2**32), "A seed must be"),
        (("--labels", "1,,2"), "no class ''"),
        (("--sigmas", "1e39"), "must be finite"),
        (("/dev/null",), "a checkpoint of openai/consistency_models_cifar10"),
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


@pytest.mark.skipif(not kernels.available(), reason="No C++ compiler.")
def test_the_first_compilation_of_the_kernels_is_reported(tmp_path, copying):
    arguments = ("sample.py", "emoji16_cd", "--count", "1", "--output", str(tmp_path / "s.npz"))
    first, second = (run(*arguments, XDG_CACHE_HOME=str(tmp_path), CXX=copying[0], LINK_SECONDS="3") for _ in range(2))
    assert "Compiling the CPU kernels" in first.stderr
    assert not re.search(r"[^\n -~]", first.stderr)  # no control characters
    assert "kernels" not in second.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nTrace")]
)
def test_too_little_memory_gives_one_message(capsys, error):
    def fails():
        raise error

    said = failed(capsys, lambda _: running.run(fails))
    assert "Out of memory" in said
    assert "--batch-size" in said
    assert "Trace" not in said
