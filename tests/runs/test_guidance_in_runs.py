"""Guidance in commands and training runs."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import cm_jax
import cm_jax.cli.evaluate
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main_edit, main_evaluate, main_sample
from cm_jax.diffusion.guidance import FixedGuidance, UniformGuidance
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.training.loop import train
from cm_jax.training.setup import prepare
from cm_jax.types import digest
from tests.laws.test_interval_embedding import SONG
from tests.runs.test_commands import failed, succeeded
from tests.runs.test_evaluate_command import TOLD, toy
from tests.runs.test_training import SMALL, UNET
from tests.runs.test_training_setup import STUDENT
from tests.support import random_params

PLAIN = dataclasses.replace(SONG, interval_embedding=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a conditional denoiser and of an unconditional guide."""
    folder = tmp_path_factory.mktemp("models")
    for name, classes in (("teacher", 3), ("guide", None)):
        network = dataclasses.replace(PLAIN, classes=classes)
        Model(ModelConfig(network, EDMPreconditioning()), random_params(network)).save(folder / name)
    return folder


def test_guided_samples_on_the_command_line(models, tmp_path, capsys):
    arrays = {}
    for name, options in {
        "plain": (),
        "1": ("--guidance", 1, "--guidance-model", models / "guide"),
        "itself": ("--guidance", 2),
        "guide": ("--guidance", 2, "--guidance-model", models / "guide", "--guidance-interval", "0.28,2.9"),
    }.items():
        output = tmp_path / f"{name}.npz"
        arguments = ("--count", 2, "--labels", "1", "--steps", 3, "--output", output)
        said = succeeded(capsys, main_sample, models / "teacher", *arguments, *options)
        assert ("guidance 2" in said) == (name in ("itself", "guide"))
        with np.load(output) as saved:
            arrays[name] = saved["arr_0"]
    np.testing.assert_array_equal(arrays["1"], arrays["plain"])
    assert len({array.tobytes() for array in arrays.values()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance-model", "GUIDE"), "give guidance as well"),
        (("--guidance", 2, "--guidance-interval", "1"), "Expected two noise levels"),
        (("--guidance", 2, "--guidance-interval", "1,x"), "--guidance-interval must be numbers"),
        (("--guidance", 2, "--guidance-model", "nowhere"), "There is no checkpoint nowhere"),
        (("--guidance", 2, "--guidance-model", "emoji16_cd"), "as guide, got a consistency model"),
    ],
)
def test_impossible_guidance_is_one_message(models, tmp_path, capsys, options, message):
    words = [models / "guide" if word == "GUIDE" else word for word in options]
    assert message in failed(capsys, main_sample, models / "teacher", *words, "--output", tmp_path / "a.png")


def test_the_protocol_has_every_setting_that_changes_the_images(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cm_jax.cli.evaluate, "load_inception", lambda weights: toy(8))
    output, guide = tmp_path / "report.json", models / "guide"
    options = ("--steps", 2, "--churn", "40", "--clip", "off", "--guidance", 2, "--guidance-model", guide)
    told = ("--guidance-interval", "0.28,2.9", "--metrics", "fid", "--count", 4, *TOLD, "--output", output)
    said = succeeded(capsys, main_evaluate, models / "teacher", "emoji:held_out", *options, *told)
    found, sha = json.loads(output.read_text())["protocol"]["sampling"], digest(cm_jax.load(guide).params)
    assert found["sampler_settings"]["churn"].startswith("Churn(amount=40")
    assert (found["clip"], found["guidance"], found["guide_sha256"]) == (False, 2, sha)
    assert "(Heun(churn=Churn(amount=40" in said
    assert f"guidance 2 by the model of SHA-256 {sha[:12]} for sigma in (0.28, 2.9], seed 0)" in said


def test_edits_of_a_guided_student(tmp_path, capsys):
    network = dataclasses.replace(PLAIN, guidance_embedding=True)
    config = ModelConfig(network, ConsistencyPreconditioning(), num_levels=18, guidance_range=(1.0, 3.0))
    Model(config, random_params(network)).save(tmp_path / "guided")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "a.png")
    written = []
    for options in ((), ("--guidance", 1), ("--guidance", 3)):
        told = ("--checkpoint", tmp_path / "guided", "--output", tmp_path / "e.png", "--labels", 0, *options)
        for kind in (("stroke", tmp_path / "a.png"), ("interpolate", tmp_path / "a.png", tmp_path / "a.png")):
            succeeded(capsys, main_edit, *kind, *told)
            written.append((tmp_path / "e.png").read_bytes())
    assert written[:2] == written[2:4]
    assert written[0] != written[4]
    assert written[1] != written[5]
    options = ("--checkpoint", tmp_path / "guided", "--output", tmp_path / "e.png", "--labels", 0, "--guidance", 4)
    assert "Expected guidance in [1, 3]" in failed(capsys, main_edit, "stroke", tmp_path / "a.png", *options)


def test_guidance_of_images_is_refused(capsys):
    options = ("--guidance-interval", "1,2", "--guidance", 2)
    assert "--guidance applies to checkpoints" in failed(capsys, main_evaluate, "emoji", "emoji:held_out", *options)


def test_a_run_records_its_label_dropout_and_a_guided_student_starts_as_its_teacher(tmp_path):
    teacher = dataclasses.replace(SMALL, network=UNET, label_dropout=0.5, images=SMALL.batch_size)
    train(teacher, tmp_path / "teacher", lambda line: None)
    assert cm_jax.load(tmp_path / "teacher").config.label_dropout == 0.5
    student = dataclasses.replace(
        STUDENT,
        teacher=str(tmp_path / "teacher"),
        network=dataclasses.replace(UNET, dropout=0.0, guidance_embedding=True),
        objective=dataclasses.replace(STUDENT.objective, guidance=UniformGuidance(1.0, 3.0)),
        images=STUDENT.batch_size,
    )
    setup = prepare(student)
    start = setup.initial_state().params
    assert not start.pop("guidance")["weight"].any()
    jax.tree.map(np.testing.assert_array_equal, start, cm_jax.load(tmp_path / "teacher").params)
    train(student, tmp_path / "student", lambda line: None)
    model = cm_jax.load(tmp_path / "student")
    assert model.config.guidance_range == (1.0, 3.0)
    assert model.params["guidance"]["weight"].any()
    assert model.sample(0, 1, labels=0, guidance=2.0).shape == (1, 8, 8, 3)
    train(dataclasses.replace(student, images=2 * student.batch_size), tmp_path / "student", lambda line: None)


def test_a_teacher_without_label_dropout_cannot_guide_itself(teacher):
    objective = dataclasses.replace(STUDENT.objective, guidance=FixedGuidance(2.0))
    with pytest.raises(InputError, match=r"--label-dropout 0\.1"):
        prepare(dataclasses.replace(STUDENT, teacher=str(teacher[0]), objective=objective))


def test_a_run_folder_without_label_dropout_still_loads(teacher, tmp_path):
    """Configs written before the field existed."""
    run = shutil.copytree(teacher[0], tmp_path / "run")
    fields = json.loads((run / "config.json").read_text())
    del fields["label_dropout"]
    (run / "config.json").write_text(json.dumps(fields))
    train(dataclasses.replace(SMALL, sample_every=12), run, lambda line: None)
