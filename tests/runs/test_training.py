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
from cm_jax.checkpoints import native
from cm_jax.data import EmojiData, NpzData
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, Constant, ConstantTargetEMA
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning, MeanFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.objectives import ConsistencyDistillation, ConsistencyTraining, ContinuousTraining, Denoising, MeanFlow
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.optimizers import Adam, ConstantRate, LinearDecay
from cm_jax.training.run.dry_run import report
from cm_jax.training.setup import make_step, prepare, unfinished_schedules

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


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a finished run, and what it said."""
    folder, said = tmp_path_factory.mktemp("runs") / "teacher", []
    train(dataclasses.replace(SMALL, sample_every=12), folder, said.append)
    return folder, said


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


STUDENT = dataclasses.replace(
    SMALL,
    network=dataclasses.replace(NETWORK, dropout=0.0),
    preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
    objective=ConsistencyDistillation(Constant(6)),
    target_ema=ConstantTargetEMA(0.9),
)


def test_a_student_is_initialized_from_its_teacher_and_samples_in_one_step(teacher, tmp_path):
    folder, _ = teacher
    run = tmp_path / "student"
    train(dataclasses.replace(STUDENT, teacher=str(folder), images=8 * 2), run, lambda line: None)
    config, params = native.restore(run / "checkpoints" / "00000002")
    _, before = native.restore(folder / "checkpoints" / "00000012")
    assert config.distilled
    change = jax.tree.map(lambda new, old: np.abs(new - old).max(), params, before)
    assert 0 < max(jax.tree.leaves(change)) < 0.02
    assert cm_jax.load(run).sample(0, 1, labels=3).shape == (1, 8, 8, 3)


def test_the_extras_of_an_objective_stay_out_of_the_model(teacher, tmp_path):
    from cm_jax.objectives import AdaptiveWeight

    settings = dataclasses.replace(
        STUDENT,
        network=dataclasses.replace(NETWORK, attention="plain"),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=ContinuousTraining(adaptive=AdaptiveWeight()),
        target_ema=None,
        init_from=str(teacher[0]),
        images=8 * 2,
    )
    run = tmp_path / "sct"
    train(settings, run, lambda line: None)
    assert any("adaptive_weight" in name for name in arrays(run, 2))
    model = cm_jax.load(run)
    assert "adaptive_weight" not in model.params
    assert model.config.distilled


REFUSED = {
    "no teacher": ({"teacher": ""}, "ConsistencyDistillation needs a teacher: give a denoiser with --teacher"),
    "teacher that is not there": ({"teacher": "nowhere"}, "--teacher nowhere: There is no checkpoint nowhere"),
    "teacher of another shape": (
        {"network": dataclasses.replace(NETWORK, base_channels=32)},
        r"network.*\n  .*base_channels: 16 .*32",
    ),
    "teacher with other noise conditioning": (
        {"preconditioning": ConsistencyPreconditioning()},
        r"c_noise\(sigma\): that of EDM.* in the checkpoint",
    ),
    "batch that does not divide": (
        {"batch_size": 30, "parallel": "pmap"},
        "Batch size 30 is not divisible by 8 devices; use 32",
    ),
    "classes that differ": (
        {"network": dataclasses.replace(NETWORK, classes=4), "init_from": "fresh"},
        "classes",
    ),
    "an adaptive target without a progressive curriculum": (
        {"target_ema": AdaptiveTargetEMA(), "objective": ConsistencyTraining(Constant(18)), "teacher": ""},
        "follows a Progressive curriculum",
    ),
    "a teacher that nobody asked for": ({"objective": ConsistencyTraining()}, "ConsistencyTraining has no teacher"),
    "fused attention under forward derivatives": (
        {
            "objective": ContinuousTraining(),
            "preconditioning": EDMPreconditioning(time_factor=EDM_TIME),
            "network": dataclasses.replace(NETWORK, attention="auto"),
            "teacher": "",
        },
        'attention="plain"|--network.attention plain',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_incompatible_settings_are_refused_before_anything_is_written(name, teacher, tmp_path):
    changes, message = REFUSED[name]
    settings = dataclasses.replace(STUDENT, **({"teacher": str(teacher[0])} | changes))
    with pytest.raises(InputError, match=message):
        train(settings, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


def test_labels_are_missing_for_a_conditional_network(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    settings = dataclasses.replace(SMALL, data=NpzData(str(tmp_path / "images.npz")))
    with pytest.raises(InputError, match=r"have no labels: give --network.classes none"):
        train(settings, tmp_path / "run", lambda line: None)


def test_labels_that_the_network_does_not_want_are_left_out(tmp_path):
    settings = dataclasses.replace(SMALL, network=dataclasses.replace(NETWORK, classes=None), images=8)
    train(settings, tmp_path / "run", lambda line: None)
    assert cm_jax.load(tmp_path / "run").config.class_names == ()


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


def test_a_dry_run_counts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(report(prepare(SMALL)))
    assert f"{NETWORK.parameter_count():,} parameters" in lines
    assert "12 batches, 96 images" in lines
    assert "FLOP per step" in lines
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_of_a_rate_that_will_not_have_fallen():
    falling = dataclasses.replace(SMALL, optimizer=Adam(LinearDecay(1e-3, warm_up=3, steps=10)))
    lines = [line for line, _ in zip(report(prepare(falling)), range(7), strict=False)]
    warning = "--optimizer.learning-rate takes 13 steps, but the run has 12"
    assert any(warning in line for line in lines)
    longer = dataclasses.replace(falling, images=8 * 13)
    assert not list(unfinished_schedules(longer))


COUNTS = {
    "emoji32": 6_990_467,
    "cifar10": 0,
    "imagenet64": 295_899_267,
    "lsun256": 526_304_771,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_match_their_names(name):
    settings = PRESETS[name]()
    assert PRESETS[name].__doc__
    assert PRESETS[name].__name__ == name.replace("-", "_")
    teacher = settings.function if settings.objective.has_teacher else None
    if teacher is not None:
        assert settings.teacher
        teacher = dataclasses.replace(
            teacher, preconditioning=EDMPreconditioning(time_factor=settings.preconditioning.time_factor)
        )
    make_step(settings, teacher)
    family = name.split("-")[0]
    if COUNTS[family] and not settings.network.interval_embedding:
        assert settings.network.parameter_count() == COUNTS[family]
    steps = settings.images // settings.batch_size
    curriculum = settings.objective.curriculum
    assert getattr(curriculum, "steps", steps) == steps
    assert settings.batches * settings.batch_size >= settings.images
    assert list(unfinished_schedules(settings)) == []
    if curriculum is not None:
        assert int(curriculum(steps)) == settings.objective.final_num_levels


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("emoji32-edm", []),
        ("emoji32-cd", []),
        ("emoji32-ct", ["--objective.curriculum.steps"]),
        ("emoji32-ect", ["--objective.gap.steps-per-stage"]),
        ("emoji32-sct", ["--objective.warm-up.steps"]),
    ],
)
def test_a_run_that_ends_before_its_curriculum_says_so(name, flags):
    short = dataclasses.replace(PRESETS[name](), images=100_000)
    lines = list(unfinished_schedules(short))
    assert len(lines) == len(flags)
    for line, flag in zip(lines, flags, strict=True):
        assert f"Change {flag} or raise --images." in line
        assert "the run has 782" in line


def test_every_objective_has_an_emoji_preset():
    kinds = {type(PRESETS[name]().objective).__name__ for name in PRESETS if name.startswith("emoji32")}
    assert kinds >= {
        "Denoising",
        "ConsistencyDistillation",
        "ConsistencyTraining",
        "EasyConsistencyTuning",
        "ContinuousTraining",
        "ContinuousDistillation",
        "MeanFlow",
    }
    assert PRESETS["emoji32-meanflow"]().preconditioning == MeanFlowPreconditioning()
    assert isinstance(PRESETS["emoji32-meanflow"]().objective, MeanFlow)
    assert isinstance(PRESETS["imagenet64-edm"]().network, ADMUNet)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog):
    run, said = tmp_path / "run", []
    train(dataclasses.replace(SMALL, images=8 * 8), run, said.append)
    file = run / "checkpoints" / "00000008" / "state" / "state.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        train(SMALL, run, said.append)
    assert "00000008" in caplog.text
    assert any("Resuming after batch 4" in line for line in said)


def test_the_original_s_checkpoint_is_a_teacher(tmp_path):
    """A .pt file as OpenAI's code writes it, converted with what it does not tell, and distilled."""
    from cm_jax.conversion import CheckpointHints, read, write
    from tests.support import DATA

    file = DATA / "openai" / "adm_unconditional.pt"
    with pytest.raises(InputError, match=r"(?s)--teacher .*cm-jax convert"):
        prepare(dataclasses.replace(STUDENT, teacher=str(file)))
    described = json.loads((DATA / "openai" / "adm_unconditional.json").read_text())
    source = read(file, CheckpointHints(described.get("num_head_channels"), described.get("num_heads"), "edm", 40, 16))
    write(tmp_path / "teacher", "native", source.config, source.params)
    settings = dataclasses.replace(
        STUDENT,
        network=source.config.network,
        preconditioning=ConsistencyPreconditioning(),
        teacher=str(tmp_path / "teacher"),
        images=8,
    )
    run = prepare(settings)
    assert run.step.models.teacher == source.config.function
    begun = run.initial_state()
    assert jax.tree.structure(begun.params) == jax.tree.structure(source.params)
    assert all(map(np.array_equal, jax.tree.leaves(begun.params), jax.tree.leaves(source.params)))


def test_a_refused_start_leaves_no_folder(tmp_path):
    chosen = dataclasses.replace(PRESETS["emoji32-edm"](), init_from="emoji32")
    with pytest.raises(InputError, match=r"(?s)network in .* differs from this run.*in the checkpoint"):
        train(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()
