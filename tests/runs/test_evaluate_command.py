"""`cm-jax evaluate` as a user runs it, with a toy in the place of Inception-V3, whose weights are not here."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main, main_evaluate
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.evaluation import FeatureExtractor, Report, image_sets
from cm_jax.networks import ADMUNet
from tests.laws.test_evaluation import toy_features
from tests.runs.test_commands import failed, succeeded

TOLD = ("--reference-cache", "off", "--compilation-cache", "off")


def toy(size):
    mix = np.random.default_rng(5).normal(size=(size * size * 3, 24)).astype(np.float32)
    return FeatureExtractor(toy_features, {"mix": mix}, "a toy", "no resizing")


@pytest.fixture(autouse=True)
def extractor(monkeypatch):
    from cm_jax.cli import evaluate

    monkeypatch.setattr(evaluate, "load_inception", lambda weights: toy(16))


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3)).astype(np.uint8))
    return path


def test_samples_straight_from_a_checkpoint_are_those_that_are_written(tmp_path, capsys):
    output, reference = tmp_path / "numbers.json", tmp_path / "reference.npz"
    told = ("--metrics", "fid,kid,prdc", "--count", 12, "--seed", 3, *TOLD)
    said = succeeded(
        capsys, main_evaluate, "emoji16_cd", "emoji:held_out", *told, "--output", output, "--save-reference", reference
    )
    last = said.splitlines()[-1]
    assert "N = 12 of emoji16_cd (Consistency, 1 step, sigma 80, seed 3) against 431 of emoji:held_out" in last
    found = json.loads(output.read_text())
    assert found["protocol"]["count"] == 12
    assert {"fid", "kid", "precision", "recall", "density", "coverage"} <= set(found["values"])

    images = image_sets.quantize(cm_jax.load("emoji16_cd").sample(3, 12))
    np.savez(tmp_path / "samples.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    for name in ("samples.npz", "folder"):
        succeeded(capsys, main, "evaluate", tmp_path / name, reference, "--metrics", "fid", *TOLD, "--output", output)
        assert json.loads(output.read_text())["values"]["fid"] == pytest.approx(found["values"]["fid"], rel=1e-9)


def test_a_set_against_itself(samples, capsys):
    said = succeeded(capsys, main_evaluate, samples, samples, "--metrics", "fid,pr", *TOLD)
    assert "precision 1, recall 1 [N = 30 of" in said


def test_bits_of_a_teacher(tmp_path, capsys):
    teacher, output = tmp_path / "teacher", tmp_path / "numbers.json"
    network = ADMUNet(
        image_size=8,
        base_channels=32,
        channel_mult=(1,),
        blocks_per_level=1,
        attention_factors=(),
        head_dim=16,
        classes=9,
    )
    config = ModelConfig(network, EDMPreconditioning())
    cm_jax.Model(config, network.initialize(jax.random.key(0))).save(teacher)
    told = ("--metrics", "bpd", "--count", 2, "--likelihood-steps", 2, "--batch-size", 8, "--output", output, *TOLD)
    said = succeeded(capsys, main_evaluate, teacher, "emoji:held_out", *told)
    assert "N = 2 of emoji:held_out under" in said
    assert np.isfinite(json.loads(output.read_text())["values"]["bpd"])


def test_tuned_levels_are_kept_in_the_checkpoint(tmp_path, capsys, monkeypatch):
    from cm_jax.cli import tune
    from cm_jax.evaluation import level_search

    network = ADMUNet(
        image_size=8,
        base_channels=32,
        channel_mult=(1,),
        blocks_per_level=1,
        attention_factors=(),
        head_dim=16,
        classes=9,
    )
    config = ModelConfig(network, ConsistencyPreconditioning(), num_levels=12, tuned_timesteps=((3, 0), (5, 2, 0)))
    cm_jax.Model(config, network.initialize(jax.random.key(0))).save(tmp_path / "model")
    monkeypatch.setattr(tune, "load_inception", lambda weights: toy(8))
    asked = []

    def measured(extractor, samples, known, **told):
        asked.append(samples.how["sigmas"])
        return Report({"fid": abs(samples.how["sigmas"][1] - config.schedule.sigma(7, 12))}, {}, ""), known

    monkeypatch.setattr(level_search, "evaluate", measured)
    said = succeeded(capsys, main, "tune", tmp_path / "model", "emoji:held_out", "--count", 4, *TOLD)
    assert "--timesteps 7,0 with FID" in said
    tuned = cm_jax.load(tmp_path / "model")
    assert tuned.config.tuned_timesteps == ((7, 0), (5, 2, 0))
    assert tuned.plan(steps=2).levels[1] == pytest.approx(config.schedule.sigma(7, 12))
    assert all(sigmas[0] == pytest.approx(80) for sigmas in asked)

    def removed(*arguments, **told):  # by a training run
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return measured(*arguments, **told)

    monkeypatch.setattr(level_search, "evaluate", removed)
    words = ("tune", tmp_path / "model", "emoji:held_out", "--count", 4)
    assert "was removed meanwhile" in failed(capsys, main, *words, *TOLD)
    assert not (tmp_path / "model").exists()
    assert "cannot store tuned noise levels" in failed(capsys, main, "tune", "emoji16_cd", "emoji", *TOLD)


def test_bad_input_is_one_message(samples, tmp_path, capsys):
    def message(*arguments):
        return failed(capsys, main_evaluate, *arguments, *TOLD)

    assert "There is no metric 'fidd'" in message(samples, "emoji", "--metrics", "fidd")
    assert "There are no images emojis" in message(samples, "emojis")
    assert "There is no checkpoint nothing" in message("nothing", "emoji")
    assert "Expected a count in [1, 30]" in message(samples, "emoji", "--count", 31)
    assert "--steps applies to checkpoints" in message(samples, "emoji", "--steps", 2)
    assert "no classifier" in message(samples, "emoji", "--metrics", "is")
    assert "pr needs at least 4 images" in message(samples, samples, "--metrics", "pr", "--count", 3)
    assert "bpd needs a checkpoint" in message(samples, "emoji", "--metrics", "bpd")
    assert "--steps applies to samples" in message("emoji16_cd", "emoji", "--metrics", "bpd", "--steps", 2)
    assert "need a denoiser" in message("emoji16_cd", "emoji", "--metrics", "bpd", "--count", 2)
    assert "add one of them" in message(samples, samples, "--metrics", "kid", "--save-reference", tmp_path / "x.npz")
    assert "There is no emoji split 'test'" in message(samples, "emoji:test")

    other = tmp_path / "other.npz"
    np.savez(other, arr_0=np.zeros((30, 32, 32, 3), np.uint8))
    assert "has images of 16 x 16 pixels" in message(samples, other)
    np.savez(other, pictures=np.zeros((30, 16, 16, 3), np.uint8))
    assert "it has no images or arr_0, but pictures" in message(other, samples)
    assert "it has no images or arr_0, but pictures" in message(samples, other)
    np.savez(other, arr_0=np.full((30, 16, 16, 3), np.nan, np.float32))
    assert "NaN or infinite" in message(other, samples)
    np.savez(other, arr_0=np.zeros((30, 16, 16, 3), np.float32))
    assert "expected images uint8 [n, height, width, channels], got float32" in message(other, samples)
    np.savez(other, arr_0=np.zeros((30, 16, 16, 6), np.uint8))
    assert "has images of 6 channels" in message(other, samples)
    np.savez(other, mu=np.zeros(24), sigma=np.eye(24))
    assert "it has no images or arr_0, but mu, sigma" in message(other, samples)
    assert "kid needs images of the reference" in message(samples, other, "--metrics", "fid,kid")
    for suffix, advice in ((".npy", "Save it as .npz: numpy.savez("), (".pkl", "mu=..., sigma=...)"), (".txt", "")):
        file = tmp_path / f"file{suffix}"
        file.write_bytes(b"content")
        said = message(samples, file)
        assert f"is a file of type {suffix}; expected an .npz file" in said
        assert advice in said
    assert "numpy.savez('file.npz', arr_0=numpy.load('file.npy'))" in message(tmp_path / "file.npy", samples)
    other.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "run `git lfs pull`" in message(samples, other)
    assert "run `git lfs pull`" in message(other, samples)
    other.write_bytes(samples.read_bytes()[:2000])
    assert "cannot be used as" in message(samples, other)
    assert "cannot be used as" in message(other, samples)
    (tmp_path / "mixed").mkdir()
    for size in (16, 20):
        Image.new("RGB", (size, size)).save(tmp_path / "mixed" / f"{size}.png")
    assert "Expected samples of one size" in message(tmp_path / "mixed", samples)


def test_statistics_of_other_features_are_refused_before_sampling(tmp_path, capsys, monkeypatch):
    def sample(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr(cm_jax.Model, "batches", sample)
    np.savez(tmp_path / "dims64.npz", mu=np.zeros(64), sigma=np.eye(64))
    said = failed(capsys, main_evaluate, "emoji16_cd", tmp_path / "dims64.npz", "--count", 8, *TOLD)
    assert "has statistics of 64 features, expected 24 of a toy" in said
    assert "pytorch-fid: --dims 24" in said


def test_truncated_weights_and_samples_that_are_not_finite(samples, tmp_path, capsys, monkeypatch):
    from cm_jax.cli import evaluate
    from cm_jax.evaluation import load_inception
    from cm_jax.feature_networks import inception_v3

    weights = tmp_path / "inception.safetensors"
    inception_v3.FILE.save(weights, {"conv": {"kernel": np.zeros((3, 3, 3, 32), np.float32)}})
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(evaluate, "load_inception", load_inception)
    said = failed(capsys, main_evaluate, samples, "emoji", "--inception", weights, *TOLD)
    assert "is not a complete weight file of Inception-V3: " in said
    with pytest.raises(cm_jax.errors.InputError, match="1 of 3 images of mine have NaN"):
        image_sets.check_finite(
            np.where(np.arange(3)[:, None, None, None] == 1, np.nan, np.zeros((3, 4, 4, 3))), "mine"
        )
