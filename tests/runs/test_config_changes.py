"""Resuming a run with other settings: what is free, what needs permission, and what the run records."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from cm_jax.checkpoints.serialization import hints, kinds
from cm_jax.data import EmojiData, InMemory, NpzData
from cm_jax.diffusion.curricula import Constant
from cm_jax.errors import InputError
from cm_jax.objectives import ConsistencyDistillation, EasyConsistencyTuning
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.optimizers import AdamW, ConstantRate, LinearDecay, RAdam
from cm_jax.training.run.changes import EFFECTS, Effect, effect_of
from cm_jax.training.setup import TrainingSetup
from tests.runs.test_training import NETWORK, SMALL, arrays, assert_same_run, rows

pytestmark = pytest.mark.usefixtures("without_pictures")
STEP = dataclasses.replace(SMALL, images=8 * 4, log_every=1)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of four batches of eight images."""
    run = tmp_path_factory.mktemp("runs") / "started"
    train(STEP, run, lambda line: None)
    return run


@pytest.fixture
def run(started, tmp_path):
    return shutil.copytree(started, tmp_path / "run")


def places(kind, above=""):
    """All fields of a configuration with all its components, without distances of distances."""
    for name, hint in hints(kind).items():
        yield above + name
        for component in kinds(hint).values() if name not in above.split(".") else ():
            yield from places(component, f"{above}{name}.")


def test_every_field_has_one_effect():
    known = set(places(TrainConfig))
    assert {place for place in known if "." not in place} <= EFFECTS.keys()
    assert {name.removesuffix(".*") for name in EFFECTS} <= known
    assert all(isinstance(effect_of(place), Effect) for place in known)
    expected = {
        "optimizer.learning_rate.peak": Effect.NUMBERS,
        "objective": Effect.MODEL,
        "objective.distance": Effect.NUMBERS,
        "network.dropout": Effect.NUMBERS,
        "network.channel_mult": Effect.MODEL,
        "data.path": Effect.NUMBERS,
        "data.workers": Effect.NONE,
    }
    assert {place: effect_of(place) for place in expected} == expected


def test_a_new_batch_size_continues_the_data_and_the_count_of_images(run):
    """With AdamW and clipping in place of Adam, whose moments are kept."""
    before, saved = (run / "config.json").read_text(), arrays(run, 4)
    optimizer = AdamW(ConstantRate(1e-3), beta1=0.99, clip_norm=1e9)
    larger = dataclasses.replace(STEP, batch_size=16, images=8 * 4 + 16 * 2, optimizer=optimizer)
    with pytest.raises(InputError, match=r"(?s)batch_size: 8 in the folder, 16 now.*or --allow-config-change"):
        train(larger, run, lambda line: None)
    assert (run / "config.json").read_text() == before
    said, seen = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InMemory, "indices", recorded(seen, InMemory.indices))
        train(larger, run, said.append, allow_config_change=True)
    assert "Note: batch_size: 8 -> 16 from batch 4 on." in said
    assert "Note: optimizer: Adam -> AdamW from batch 4 on." in said
    whole = [EmojiData().open(8).indices(8, 0, number) for number in range(8)]
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(whole[4:]))
    assert [row["images"] for row in rows(run)] == ["8", "16", "24", "32", "48", "64"]
    assert [row["configuration"] for row in rows(run)] == ["", "", "", "", "1", "1"]
    after, name = arrays(run, 6), "mu/mlp/in"
    assert after["optimizer/1/count"] == after["optimizer/3/count"] == 6
    change = np.abs(after[f"optimizer/1/{name}"] - saved[f"optimizer/0/{name}"]).max()
    assert 0 < change < 0.1 * np.abs(saved[f"optimizer/0/{name}"]).max() + 0.02
    first, second = json.loads((run / "config_history.json").read_text())["configurations"]
    assert (first["batches"], second["batches"]) == (0, 4)
    assert second["changes"]["batch_size"] == {"old": 8, "new": 16}
    assert (first["config"]["batch_size"], second["config"]["batch_size"]) == (8, 16)
    train(larger, run, said.append)  # no permission is needed: as in the folder
    assert "is finished after 6 batches" in said[-1]
    train(dataclasses.replace(larger, batch_size=8), run, said.append, allow_config_change=True)
    assert "Note: batch_size: 16 -> 8 from batch 6 on." in said
    third = json.loads((run / "config.json").read_text())
    assert third["image_offset"] == 64 - 8 * 6
    assert len(json.loads((run / "config_history.json").read_text())["configurations"]) == 3


def recorded(seen, original):
    def indices(self, *arguments):
        seen.append(original(self, *arguments))
        return seen[-1]

    return indices


def test_emas_and_the_optimizer_are_carried_over(run, tmp_path):
    before, said = arrays(run, 4), []
    settings = dataclasses.replace(
        STEP,
        images=8 * 5,
        ema_decay=(0.95, 0.9),
        power_ema=(0.2,),
        optimizer=RAdam(LinearDecay(1e-12, steps=100), clip_norm=1.0),
    )
    train(settings, run, said.append, allow_config_change=True)
    after = arrays(run, 5)
    for new, old in (("exponential_0.95", "exponential_0.9"), ("power_0.2", "power_0.1")):
        assert f"Note: The EMA {new} is initialized from the EMA {old}." in said
    for name in ("exponential_0.99", "power_0.1"):
        assert f"Note: The EMA {name} is dropped." in said
    assert "Note: The optimizer's moments start anew (RAdamState)." in said
    assert 'Note: evaluation.ema: "exponential_0.9" -> "exponential_0.95" from batch 4 on.' in said
    near = before["ema/exponential_0.9/mlp/in"] * 0.95 + before["params/mlp/in"] * 0.05
    np.testing.assert_allclose(after["ema/exponential_0.95/mlp/in"], near, atol=1e-6)
    assert after["optimizer/1/steps"] == 1
    assert after["optimizer/2/count"] == 5
    assert float(rows(run)[-1]["learning_rate"]) == pytest.approx(1e-12 * (1 - 4 / 100))
    killed = shutil.copytree(run, tmp_path / "killed")  # after the settings were written, before the next checkpoint
    shutil.rmtree(killed / "checkpoints" / "00000005")
    train(settings, killed, lambda line: None)
    assert_same_run(run, killed, 5)


def test_what_the_parameters_mean_cannot_change(run):
    for change, place in (
        ({"network": dataclasses.replace(NETWORK, width=64)}, "network.width"),
        ({"objective": EasyConsistencyTuning()}, "objective"),
    ):
        with pytest.raises(InputError, match=f"(?s){place}.*cannot change in a run: start a new run"):
            train(dataclasses.replace(STEP, **change), run, lambda line: None, allow_config_change=True)


def test_moved_data_are_free_and_others_are_not(tmp_path):
    data = EmojiData().open(8)
    for name, order in (("a", 1), ("moved", 1), ("other", -1)):
        np.savez(tmp_path / f"{name}.npz", images=data.images[::order], labels=data.labels[::order])
    settings = dataclasses.replace(STEP, images=8, data=NpzData(str(tmp_path / "a.npz")))
    run, said = tmp_path / "run", []
    train(settings, run, said.append)
    moved = dataclasses.replace(settings, data=NpzData(str(tmp_path / "moved.npz")))
    train(dataclasses.replace(moved, grad_accum_steps=2), run, said.append)
    assert any("with the same content: data.path" in line for line in said)
    assert "Note: Changed, with the same results up to rounding: grad_accum_steps: 1 -> 2." in said
    np.savez(tmp_path / "moved.npz", images=data.images[:90], labels=data.labels[:90])
    with pytest.raises(InputError, match=r'data content: "3334 images, .* in the folder, "90 images, .* now'):
        train(moved, run, said.append)
    with pytest.raises(InputError, match=r"data\.path"):
        train(dataclasses.replace(settings, data=NpzData(str(tmp_path / "other.npz"))), run, said.append)
    assert not (run / "config_history.json").exists()


@pytest.mark.parametrize("damage", ["{}", '{"format": 1, "configurations": [{}]}', '{"format": 2}'])
def test_a_damaged_history_is_named(run, damage):
    (run / "config_history.json").write_text(damage)
    with pytest.raises(InputError, match=r"config_history.json is damaged"):
        train(STEP, run, lambda line: None)


def test_checkpoints_without_their_settings_are_not_resumed(run):
    (run / "config.json").unlink()
    with pytest.raises(InputError, match=r"has checkpoints but no config\.json.*restore the file, or start a new run"):
        train(dataclasses.replace(STEP, images=8 * 5), run, lambda line: None)


def test_a_start_that_fails_leaves_the_settings_as_they_were(run, monkeypatch):
    larger = dataclasses.replace(STEP, batch_size=16, images=8 * 4 + 16)
    train(larger, run, lambda line: None, allow_config_change=True)
    before = {name: (run / name).read_bytes() for name in ("config.json", "config_history.json", "run.json")}
    left = sorted(path.name for path in run.iterdir())

    def fails(*arguments):
        raise MemoryError("no device memory")

    monkeypatch.setattr(TrainingSetup, "compiled", fails)
    settings = dataclasses.replace(larger, batch_size=32, images=8 * 4 + 16 + 32)
    with pytest.raises(MemoryError):
        train(settings, run, lambda line: None, allow_config_change=True)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in run.iterdir()) == left


def test_a_teacher_that_was_trained_further_is_noticed(run, tmp_path):
    """Its run stands for its latest checkpoint, which is another one when the student resumes."""
    student, said = tmp_path / "student", []
    objective = ConsistencyDistillation(Constant(4))
    settings = dataclasses.replace(STEP, objective=objective, teacher=str(run), images=8 * 2)
    train(settings, student, said.append)
    moved = shutil.copytree(run, tmp_path / "moved")
    settings = dataclasses.replace(settings, images=8 * 3)
    train(dataclasses.replace(settings, teacher=str(moved)), student, said.append)
    assert any("with the same content: teacher: " in line for line in said)
    train(dataclasses.replace(STEP, images=8 * 5), moved, said.append)
    later = dataclasses.replace(settings, teacher=str(moved), images=8 * 4)
    with pytest.raises(InputError, match=r"(?s)teacher parameters: .* in the folder.*or --allow-config-change"):
        train(later, student, said.append)
    train(later, student, said.append, allow_config_change=True)
    changes = json.loads((student / "config_history.json").read_text())["configurations"][1]["changes"]
    assert changes.keys() == {"teacher parameters"}


def test_a_folder_may_begin_with_the_home_folder(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    said = []
    train(dataclasses.replace(STEP, images=8 * 5), "~/run", said.append)
    assert any("Resuming after batch 4" in line for line in said)
