"""Setup of runs: teachers, initial weights, settings that do not fit, and dry runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints import native
from cm_jax.data import EmojiData, NpzData
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, Constant, ConstantTargetEMA
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.objectives import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousTraining,
    ImprovedConsistencyTraining,
)
from cm_jax.presets import PRESETS
from cm_jax.training.loop import train
from cm_jax.training.optimizers import Adam, LinearDecay
from cm_jax.training.run.dry_run import report
from cm_jax.training.schedules import unfinished_schedules
from cm_jax.training.setup import prepare
from tests.runs.test_training import NETWORK, SMALL, UNET, arrays

STUDENT = dataclasses.replace(
    SMALL,
    network=dataclasses.replace(NETWORK, dropout=0.0),
    preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
    objective=ConsistencyDistillation(Constant(6)),
    target_ema=ConstantTargetEMA(0.9),
)

FROM_TEACHER = {"objective": ConsistencyTraining(Constant(6)), "teacher": ""}


def test_a_student_is_initialized_from_its_teacher_and_samples_in_one_step(teacher, tmp_path):
    folder, _ = teacher
    run = tmp_path / "student"
    said = []
    train(dataclasses.replace(STUDENT, teacher=str(folder), images=8 * 2), run, said.append)
    assert "\n".join(said).count("in 2 steps information crosses them 0.04 times") == 1
    config, params = native.restore(run / "checkpoints" / "00000002")
    _, before = native.restore(folder / "checkpoints" / "00000012")
    assert config.distilled
    change = jax.tree.map(lambda new, old: np.abs(new - old).max(), params, before)
    assert 0 < max(jax.tree.leaves(change)) < 0.02
    assert cm_jax.load(run).sample(0, 1, labels=3).shape == (1, 8, 8, 3)


def emoji_in_another_order(folder, names=None):
    """(the class names in reverse order, settings of a student on these data)."""
    data = EmojiData().open(8)
    turned = data.class_names[::-1]
    path = folder / "turned.npz"
    np.savez(path, images=data.images[:64], labels=8 - data.labels[:64], class_names=np.array(names or turned))
    return turned, dataclasses.replace(STUDENT, data=NpzData(str(path)), images=8 * 2)


def test_labels_follow_the_class_names_of_the_teacher(teacher, tmp_path):
    names, said = EmojiData().open(8).class_names, []
    _, settings = emoji_in_another_order(tmp_path)
    run = tmp_path / "student"
    train(dataclasses.replace(settings, teacher=str(teacher[0])), run, said.append)
    assert any("classes numbered as in --teacher" in line for line in said)
    assert cm_jax.load(run).config.class_names == names
    for change in ({"teacher": str(teacher[0])}, {**FROM_TEACHER, "init_from": str(teacher[0])}):
        setup = prepare(dataclasses.replace(settings, **change), initial=True)
        np.testing.assert_array_equal(setup.dataset.labels, EmojiData().open(8).labels[:64])


def test_a_teacher_with_other_class_names_is_refused(teacher, tmp_path):
    _, settings = emoji_in_another_order(tmp_path, tuple("abcdefghi"))
    with pytest.raises(InputError, match="class names of the data differ from those of --teacher"):
        train(dataclasses.replace(settings, teacher=str(teacher[0])), tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_the_order_of_its_classes(teacher, tmp_path):
    folder, _ = teacher
    turned, settings = emoji_in_another_order(tmp_path)
    settings = dataclasses.replace(SMALL, data=settings.data)
    assert prepare(settings).model_config.class_names == turned
    setup = prepare(settings, resumed=native.last_config(folder))
    assert setup.model_config.class_names == turned[::-1]
    np.testing.assert_array_equal(setup.dataset.labels, EmojiData().open(8).labels[:64])


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
        {"network": dataclasses.replace(NETWORK, width=64)},
        r"network.*\n  .*width: 32 .*64",
    ),
    "teacher with other noise conditioning": (
        {"preconditioning": ConsistencyPreconditioning()},
        r"c_noise\(sigma\): that of EDM.* in the checkpoint",
    ),
    "batch that does not divide": (
        {"batch_size": 30, "parallel": "pmap"},
        "Batch size 30 is not divisible by 8 devices; use 32",
    ),
    "shards that do not divide": (
        {"parallel": "sharded", "shards": 3},
        "8 devices cannot be grouped by 3: --shards needs --parallel sharded and a divisor",
    ),
    "shards without a sharded state": ({"shards": 4}, "--parallel is one: --shards needs --parallel sharded"),
    "classes that differ": (
        {"network": dataclasses.replace(NETWORK, classes=4), "init_from": "fresh"},
        "classes",
    ),
    "an adaptive target without a progressive curriculum": (
        {"target_ema": AdaptiveTargetEMA(), "objective": ConsistencyTraining(Constant(18)), "teacher": ""},
        "follows a Progressive curriculum",
    ),
    "a target EMA without a target": (
        {"target_ema": ConstantTargetEMA(0.9), "objective": ImprovedConsistencyTraining(), "teacher": ""},
        "ImprovedConsistencyTraining has no target network with an EMA: give --target-ema none",
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


def test_a_dry_run_counts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(report(prepare(dataclasses.replace(SMALL, network=UNET))))
    assert f"{UNET.parameter_count():,} parameters" in lines
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
    preset = PRESETS["emoji32-edm"]()
    wider = dataclasses.replace(preset.network, base_channels=64)
    chosen = dataclasses.replace(preset, network=wider, init_from="emoji32")
    with pytest.raises(InputError, match=r"(?s)network in .* differs from this run.*in the checkpoint"):
        train(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "field"), [("cd", "teacher"), ("scd", "teacher"), ("ect", "init_from"), ("sct", "init_from")]
)
def test_the_bundled_denoiser_is_a_teacher_of_the_emoji_presets(name, field):
    denoiser = cm_jax.load("emoji32_edm")
    begun = prepare(dataclasses.replace(PRESETS[f"emoji32-{name}"](), **{field: "emoji32_edm"})).initial_state()
    network = {name: begun.params[name] for name in denoiser.params}  # sCM's weighting has parameters of its own
    assert all(map(np.array_equal, jax.tree.leaves(network), jax.tree.leaves(denoiser.params)))
    held_out = EmojiData("held_out").open(32)
    images = np.stack([held_out.images[i] for i in range(16)]).astype(np.float32) / 127.5 - 1
    noise = np.random.default_rng(0).standard_normal(images.shape, np.float32)
    denoised = denoiser.denoise(images + 0.5 * noise, 0.5, labels=held_out.labels[:16])
    assert np.sqrt(np.mean(np.square(denoised - images))) < 0.1  # 0.083; emoji32: 0.137
