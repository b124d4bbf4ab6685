"""Whole training runs in this process: their files, resuming, and errors."""

import csv
import dataclasses
import json
import logging
import os
import signal

import numpy as np
import pytest

import cm_jax
from cm_jax.data import EmojiData
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.objectives import Denoising
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.optimizers import Adam, ConstantRate

NETWORK = SongUNet(
    image_size=8,
    base_channels=16,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    classes=9,
    embedding="positional",
    resampling="plain",
    pyramid=False,
    dropout=0.1,
)
SMALL = TrainConfig(
    data=EmojiData(),
    network=NETWORK,
    preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
    objective=Denoising(),
    optimizer=Adam(ConstantRate(1e-3)),
    batch_size=8,
    images=8 * 12,
    ema_decay=(0.9, 0.99),
    power_ema=(0.1,),
    parallel="one",
    log_every=2,
    sample_every=100,
    checkpoint_every=4,
)


def arrays(folder, batches):
    with np.load(folder / "checkpoints" / f"{batches:08d}" / "state" / "state.npz") as state:
        return {name: state[name] for name in state.files if name != "leaves.json"}


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def assert_same_run(one, other, batches):
    ours, theirs = arrays(one, batches), arrays(other, batches)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert rows(one) == rows(other)


def test_a_run_leaves_all_that_it_promises(teacher):
    folder, said = teacher
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["00000008", "00000012"]  # keep_last=2
    assert [row["batches"] for row in rows(folder)] == ["2", "4", "6", "8", "10", "12"]
    assert {"loss", "loss_sigma_0", "gradient_norm", "learning_rate", "images", "skipped"} <= rows(folder)[0].keys()
    for name in ("config.json", "run.json", "loss.png", "samples/00000012.png"):
        assert (folder / name).stat().st_size > 100, name
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "run.json").read_text())["starts"][0]["batches"] == 0
    assert "3,334 images" in said[0]
    assert "parameters" in said[1]
    assert said[-1] == f"Finished: 12 batches. Sample from it: cm-jax sample {folder}"


def test_ema_weights_load_as_a_model(teacher):
    folder, _ = teacher
    model = cm_jax.load(folder)
    assert not model.config.distilled
    assert model.config.class_names[0] == "Smileys & Emotion"
    averaged = arrays(folder, 12)["ema/exponential_0.9/stem/kernel"]
    np.testing.assert_array_equal(model.params["stem"]["kernel"], averaged)
    assert model.sample(0, 2, labels=[0, 8], steps=2).shape == (2, 8, 8, 3)


def test_a_stopped_run_resumes_bitwise_identical(teacher, tmp_path):
    """SIGTERM after the seventh batch, between two checkpoints and two lines of the log."""
    said = []
    settings = dataclasses.replace(SMALL, sample_every=12, log_every=1)
    whole = tmp_path / "whole"
    train(settings, whole, said.append)

    run = tmp_path / "run"
    stop_after(7, lambda: train(settings, run, said.append))
    assert said[-1] == "Stopped by SIGTERM after 7 of 12 batches. Run the same command to resume."
    train(settings, run, said.append)
    assert any("Resuming after batch 7" in line for line in said)
    assert_same_run(run, whole, 12)
    assert [start["batches"] for start in json.loads((run / "run.json").read_text())["starts"]] == [0, 7]


def stop_after(batches, begin):
    """Send this process SIGTERM when the run has begun its batch number `batches`."""
    from cm_jax.training.parallelism import OneDevice

    placed, original = [], OneDevice.place_batches

    def counting(self, given):
        placed.append(1)
        if len(placed) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneDevice, "place_batches", counting)
        begin()


def test_several_steps_in_a_call_are_the_same_run(teacher, tmp_path):
    """Also where they begin at an odd batch, and where what is left is less than a call."""
    run = tmp_path / "run"
    train(dataclasses.replace(SMALL, images=8 * 9), run, lambda line: None)
    train(dataclasses.replace(SMALL, sample_every=12, steps_per_dispatch=2), run, lambda line: None)
    one, other = arrays(run, 12), arrays(teacher[0], 12)
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-5


@pytest.mark.parametrize("parallel", ["sharded"])
def test_eight_devices_resume_a_run_of_one(parallel, teacher, tmp_path):
    """A checkpoint belongs to no number of devices."""
    run, said = tmp_path / "run", []
    half = dataclasses.replace(SMALL, images=8 * 8)
    train(half, run, said.append)
    train(dataclasses.replace(SMALL, parallel=parallel), run, said.append)
    one, other = arrays(run, 12), arrays(teacher[0], 12)
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-5
    assert any("8 x cpu" in line for line in said)


def test_a_finished_run_continues_when_images_are_raised(teacher, tmp_path):
    run, said = tmp_path / "run", []
    short = dataclasses.replace(SMALL, images=8 * 4)
    train(short, run, said.append)
    train(short, run, said.append)
    assert "is finished after 4 batches. Raise --images to continue." in said[-1]
    train(dataclasses.replace(SMALL, images=8 * 12), run, said.append)
    np.testing.assert_array_equal(arrays(run, 12)["params/stem/kernel"], arrays(teacher[0], 12)["params/stem/kernel"])


def test_another_configuration_is_refused_and_nothing_is_lost(teacher):
    folder, _ = teacher
    before = (folder / "config.json").read_text()
    other = dataclasses.replace(SMALL, optimizer=Adam(ConstantRate(2e-3)), seed=1, log_every=3)
    with pytest.raises(InputError) as caught:
        train(other, folder, lambda line: None)
    message = str(caught.value)
    assert "optimizer.learning_rate.peak: 0.001 in the folder, 0.002 now" in message
    assert "seed: 0 in the folder, 1 now" in message
    assert "log_every" not in message
    assert (folder / "config.json").read_text() == before


def test_a_loss_that_is_never_finite_stops_with_advice(tmp_path):
    settings = dataclasses.replace(SMALL, optimizer=Adam(ConstantRate(1e25)), max_consecutive_skips=3)
    with pytest.raises(InputError, match=r"not finite in 3 consecutive steps.*learning-rate"):
        train(settings, tmp_path / "run", lambda line: None)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    from cm_jax.training.run import state_io

    run = tmp_path / "run"
    train(dataclasses.replace(SMALL, images=8 * 4), run, lambda line: None)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_io, "write", full)
    with pytest.raises(InputError, match=r"(?s)could not be saved.*No space left.*after 4 batches is kept"):
        train(SMALL, run, lambda line: None)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000004"]
    monkeypatch.undo()
    train(SMALL, run, lambda line: None)
    assert (run / "checkpoints" / "00000012").is_dir()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog):
    run, said = tmp_path / "run", []
    train(dataclasses.replace(SMALL, images=8 * 8), run, said.append)
    file = run / "checkpoints" / "00000008" / "state" / "state.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        train(SMALL, run, said.append)
    assert "00000008" in caplog.text
    assert any("Resuming after batch 4" in line for line in said)
