"""Presets: sizes, components, and schedules that fit their runs."""

import dataclasses

import pytest

from cm_jax.diffusion.curricula import Progressive
from cm_jax.diffusion.preconditioning import EDMPreconditioning, MeanFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.objectives import ConsistencyTraining, MeanFlow
from cm_jax.presets import PRESETS
from cm_jax.training.run.dry_run import StandIns, dry_run
from cm_jax.training.schedules import extensible, outrun_schedules, slow_target, unfinished_schedules
from cm_jax.training.setup import make_step, prepare

COUNTS = {
    "emoji16": 2_139_715,
    "emoji32": 2_865_891,
    "cifar10": 0,
    "imagenet64": 295_899_267,
    **dict.fromkeys(
        ("imagenet64-ect", "imagenet64-sct", "imagenet64-scd"), 280_210_021
    ),  # EDM2-S and 640 numbers of its Fourier features
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
        assert settings.network.parameter_count() == COUNTS.get(name, COUNTS[family])
    steps = settings.images // settings.batch_size
    curriculum = settings.objective.curriculum
    assert getattr(curriculum, "steps", steps) == steps
    assert settings.batches * settings.batch_size >= settings.images
    assert list(unfinished_schedules(settings)) == list(outrun_schedules(settings)) == list(slow_target(settings)) == []
    if curriculum is not None:
        assert int(curriculum(steps)) == settings.objective.final_num_levels


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_needs_neither_the_checkpoint_nor_the_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = PRESETS[name]()
    inputs = StandIns(settings)
    setup = prepare(settings, inputs=inputs)
    assert setup.config.network.image_shape == settings.network.image_shape
    read = settings.teacher or (settings.inherit_network and settings.init_from)
    assert any(note.startswith(f"{read} is not here") for note in inputs.notes) == bool(read)
    assert any("data are not here" in note for note in inputs.notes) == (not name.startswith("emoji"))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reports_a_distillation_without_its_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = PRESETS["emoji32-cd"]()
    tiny = dataclasses.replace(preset.network, base_channels=8, channel_mult=(1,), blocks_per_level=1)
    small = dataclasses.replace(preset, network=tiny, batch_size=8, images=80)
    lines = "\n".join(dry_run(small, small))
    assert "in 10 steps information crosses them 0.029 times" in lines
    assert "FLOP per step" in lines
    assert "runs/emoji32-edm is not here: its network is assumed to be that of the preset" in lines
    with pytest.raises(InputError, match="--teacher elsewhere"):
        list(dry_run(dataclasses.replace(small, teacher="elsewhere"), small))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("emoji32-edm", []),
        ("emoji32-cd", []),
        ("emoji32-ct", ["--objective.curriculum.steps"]),
        ("emoji32-ect", ["--objective.gap.steps-per-stage"]),
        ("emoji32-sct", ["--objective.warm-up.steps", "--optimizer.learning-rate.steps"]),
    ],
)
def test_a_run_that_ends_before_its_curriculum_says_so(name, flags):
    short = dataclasses.replace(PRESETS[name](), images=25_000)
    lines = list(unfinished_schedules(short))
    assert len(lines) == len(flags)
    for line, flag in zip(lines, flags, strict=True):
        assert f"Change {flag} or raise --images." in line
        assert "the run has 782" in line


def test_a_target_that_is_too_slow_for_the_run_is_named():
    preset = PRESETS["emoji32-ct"]()
    paper = dataclasses.replace(preset, objective=ConsistencyTraining(Progressive(2, 150, 10_000)))
    (line,) = slow_target(paper)
    assert "in 10,000 steps information crosses them 0.094 times" in line


@pytest.mark.parametrize(
    ("name", "flag", "extended"),
    [
        ("emoji32-ct", "--objective.curriculum", "--objective.curriculum.steps"),
        ("emoji32-ect", "--objective.gap", "--objective.gap.steps-per-stage"),
    ],
)
def test_a_curriculum_that_a_raised_run_outruns_is_named(name, flag, extended):
    before = PRESETS[name]()
    raised = dataclasses.replace(before, images=4 * before.images)
    assert not list(outrun_schedules(raised))  # a new run may keep the last value
    assert not list(outrun_schedules(before, before))
    (line,) = outrun_schedules(raised, before, before.batches // 3)
    assert line.startswith(f"{flag} ends after ")
    assert line.endswith(f"it keeps its last value for the rest. To extend it, raise {extended}.")
    (line,) = outrun_schedules(raised, before, before.batches)
    assert line.endswith("To extend it, start a new run from these weights (--init-from THIS_RUN, another --run).")
    assert extensible(before, before.batches // 3) == {extended[2:].replace("-", "_")}
    assert extensible(before, before.batches) == set()


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
