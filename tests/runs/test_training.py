"""Whole training runs in this process: their files, resuming, and errors."""

import csv
import dataclasses
import json
import logging
import os
import signal

import jax
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints.post_hoc_ema import SNAPSHOTS
from cm_jax.data import EmojiData
from cm_jax.diffusion.curricula import Halving
from cm_jax.diffusion.noise_schedule import EDM_TIME, KarrasSchedule
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.objectives import Denoising, ProgressiveDistillation
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.optimizers import Adam, ConstantRate, LinearDecay
from tests.toy import ToyNetwork

NETWORK = ToyNetwork(image_size=8, classes=9, width=32, dropout=0.1)
"""What runs do with a network does not depend on it, and this one compiles seven times faster than a U-Net."""
UNET = SongUNet(
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
    power_ema=(0.1, 0.05),
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
    assert [row["batches"] for row in rows(folder)] == ["1", "2", "4", "6", "8", "10", "12"]
    assert {"loss", "loss_sigma_0", "gradient_norm", "learning_rate", "images", "skipped"} <= rows(folder)[0].keys()
    for name in ("config.json", "run.json", "loss.png", "samples/00000012.png"):
        assert (folder / name).stat().st_size > 100, name
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "run.json").read_text())["starts"][0]["batches"] == 0
    assert "3,334 images" in said[0]
    assert "parameters" in said[1]
    assert said[-1] == f"Finished: 12 batches. Sample from it: cm-jax sample {folder}"


def test_a_run_shorter_than_log_every_has_rows_of_its_first_and_last_batch(teacher, tmp_path):
    train(dataclasses.replace(SMALL, images=8 * 4, log_every=50), tmp_path / "run", lambda line: None)
    first, last = rows(tmp_path / "run")
    assert (first["batches"], last["batches"]) == ("1", "4")
    assert first == rows(teacher[0])[0]
    means = [float(row["loss"]) for row in rows(teacher[0])[1:3]]  # of batches 1 and 2, and of 3 and 4
    assert float(last["loss"]) == pytest.approx(np.mean(means), rel=1e-6)


def test_ema_weights_load_as_a_model(teacher):
    folder, _ = teacher
    model = cm_jax.load(folder)
    assert not model.config.distilled
    assert model.config.class_names[0] == "Smileys & Emotion"
    averaged = arrays(folder, 12)["ema/exponential_0.9/mlp/in"]
    np.testing.assert_array_equal(model.params["mlp"]["in"], averaged)
    assert model.sample(0, 2, labels=[0, 8], steps=2).shape == (2, 8, 8, 3)


def test_a_run_stores_snapshots_of_its_power_emas(teacher):
    folder, said = teacher
    files = sorted((folder / SNAPSHOTS).iterdir())
    assert [file.name for file in files] == ["00000006.npz", "00000012.npz"]
    with np.load(files[-1]) as file:
        stored = {name: file[name] for name in file.files if name != "leaves.json"}
    state = arrays(folder, 12)
    assert {name for name in state if name.startswith(("ema/power", "batches", "skipped"))} == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(array, state[name])
    assert any("EMA snapshots: widths 0.1 and 0.05 every 6 batches" in line for line in said)
    model = cm_jax.load(folder, ema="power_0.07")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


@pytest.mark.parametrize("network", [NETWORK, UNET], ids=lambda network: type(network).__name__)
def test_a_stopped_run_resumes_bitwise_identical(network, tmp_path):
    """SIGTERM after the seventh batch, between two checkpoints and two lines of the log; with a U-Net's kernels too."""
    said = []
    settings = dataclasses.replace(SMALL, network=network, sample_every=12, log_every=5)
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
    from cm_jax.parallelism import OneDevice

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
    np.testing.assert_array_equal(arrays(run, 12)["params/mlp/in"], arrays(teacher[0], 12)["params/mlp/in"])


def decaying(batches, steps):
    return dataclasses.replace(SMALL, images=8 * batches, optimizer=Adam(LinearDecay(1e-3, steps=steps)))


def test_a_finished_run_whose_rate_is_zero_is_not_trained_on(tmp_path):
    run, said = tmp_path / "run", []
    train(decaying(4, 4), run, said.append)
    assert not [line for line in said if "--optimizer" in line]
    before = (run / "config.json").read_text()
    train(decaying(4, 4), run, said.append)
    assert "Its learning rate has decayed to 0: to train on, start a new run from these weights" in said[-1]
    with pytest.raises(InputError, match=r"is 0 from step 4 on.*--optimizer.learning-rate has ended.*--init-from"):
        train(decaying(8, 4), run, said.append)
    with pytest.raises(
        InputError, match=r"(?s)rate.steps: 4 in the folder, 8 now.*has ended: to train on, start a new"
    ):
        train(decaying(8, 8), run, said.append)
    assert (run / "config.json").read_text() == before


def test_a_decay_that_has_not_ended_may_be_extended_on_resuming(tmp_path):
    run, said = tmp_path / "run", []
    train(decaying(4, 6), run, said.append)
    train(decaying(8, 6), run, said.append)
    note = "--optimizer.learning-rate ends after 6 steps, but the run has 8: the learning rate is 0 for the rest."
    assert f"Note: {note} To extend it, raise --optimizer.learning-rate.steps." in said
    other, said = tmp_path / "other", []
    train(decaying(4, 6), other, said.append)
    train(decaying(8, 8), other, said.append)
    assert "Note: optimizer.learning_rate.steps: 6 -> 8 from batch 4 on." in said
    assert not [line for line in said if "ends after" in line]
    rates = [float(row["learning_rate"]) for row in rows(other)]
    np.testing.assert_allclose(
        rates, [1e-3 * (1 - k / n) for k, n in ((0, 6), (1, 6), (3, 6), (5, 8), (7, 8))], rtol=1e-5
    )


def test_the_learning_rate_restarts_with_every_stage_of_progressive_distillation(teacher, tmp_path):
    run, said = tmp_path / "run", []
    settings = dataclasses.replace(
        SMALL,
        objective=ProgressiveDistillation(Halving(4, steps_per_stage=2)),
        optimizer=Adam(LinearDecay(1e-3, steps=2)),
        teacher=str(teacher[0]),
        images=8 * 3,
        log_every=1,
        checkpoint_every=2,
        keep_last=9,
        sample_every=2,
    )
    train(settings, run, said.append)
    train(dataclasses.replace(settings, images=8 * 5), run, said.append)
    assert not [line for line in said if "learning-rate" in line]
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows(run)][:4], [1e-3, 5e-4, 1e-3, 5e-4])
    assert arrays(run, 5)["optimizer/0/count"] == 3  # the last stage has twice as many steps
    for batches, steps in ((2, 4), (5, 2)):
        plan = cm_jax.load(run / "checkpoints" / f"{batches:08d}").plan()
        assert (type(plan.sampler).__name__, len(plan.levels) - 1) == ("ProgressiveEuler", steps)
        np.testing.assert_allclose(plan.levels, KarrasSchedule().descending(steps + 1), rtol=1e-6)
        named = cm_jax.load(run / "checkpoints" / f"{batches:08d}").plan(sampler="progdist")
        assert named.levels == plan.levels


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
