"""Runs that are evaluated while they train, with a toy in the place of Inception-V3, whose weights are not here."""

import csv
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints.published import resolve
from cm_jax.cli import main_train
from cm_jax.data import EmojiData
from cm_jax.errors import InputError
from cm_jax.evaluation import FeatureExtractor, evaluate, load_inception, of_dataset, of_model
from cm_jax.parallelism import OneDevice
from cm_jax.training.config import PeriodicEvaluation
from cm_jax.training.loop import train
from cm_jax.training.run import evaluation_hook
from cm_jax.training.run.dry_run import report
from cm_jax.training.run.evaluation_hook import EvaluationHook, Evaluator
from cm_jax.training.run.folder import Retention, RunFolder
from cm_jax.training.run.metrics_log import MetricsLog
from cm_jax.training.run.plots import plot
from cm_jax.training.setup import prepare
from tests.laws.test_evaluation import toy_features
from tests.runs.test_commands import failed
from tests.runs.test_run_folder import CONFIG, PARAMS
from tests.runs.test_run_log import events
from tests.runs.test_training import SMALL, arrays, assert_same_run, stop_after

EVALUATED = dataclasses.replace(
    SMALL,
    log_every=1,
    checkpoint_every=5,
    keep_last=1,
    evaluation=PeriodicEvaluation(every=24, count=16, steps=(2, 3), metrics=("fid", "kid")),
)


def quiet(line):
    del line


def toy(weights=""):
    del weights
    return FeatureExtractor(
        toy_features,
        {"mix": np.random.default_rng(5).normal(size=(8 * 8 * 3, 16)).astype(np.float32)},
        "a toy",
        "no resizing",
    )


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    """The toy, no pictures, and a cache of references."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_hook, "load_inception", toy)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of an evaluated run, and what it said."""
    folder, said = tmp_path_factory.mktemp("runs") / "evaluated", []
    train(EVALUATED, folder, said.append)
    return folder, said


def table(folder):
    with (folder / "evaluations.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_training_does_not_know_that_it_is_evaluated(unbroken, tmp_path):
    train(dataclasses.replace(EVALUATED, evaluation=None), tmp_path / "run", quiet)
    assert_same_run(tmp_path / "run", unbroken[0], 12)
    assert not (tmp_path / "run" / "evaluations.csv").exists()


def test_files_of_an_evaluated_run(unbroken):
    folder, said = unbroken
    rows = table(folder)
    assert [row["batches"] for row in rows] == [3, 6, 9, 12]
    assert [row["images"] for row in rows] == [24, 48, 72, 96]
    assert list(rows[0])[2:5] == ["fid_2_steps", "kid_2_steps", "kid_deviation_2_steps"]
    assert len({row["fid_2_steps"] for row in rows}) == 4
    best = min(rows, key=lambda row: row["fid_2_steps"])
    kept = json.loads((folder / "best.json").read_text())
    assert (kept["batches"], kept["score"]) == (best["batches"], pytest.approx(best["fid_2_steps"], rel=1e-8))
    assert {("evaluation/fid_3_steps", batches) for batches in (3, 6, 9, 12)} <= set(events(folder))
    plot(folder)
    assert (folder / "evaluations.png").stat().st_size > 1000
    assert any(line.startswith("Evaluation: fid, kid of 16 images in 2 steps and in 3 steps, against") for line in said)
    told = [line for line in said if line.startswith("Evaluated after 6 batches: FID ")]
    assert len(told) == 1
    assert " in 2 steps; FID " in told[0]
    assert said[-1] == f"Best checkpoint, after {kept['batches']} batches: cm-jax sample {folder}/best"


def test_the_best_checkpoint_has_the_numbers_that_it_was_kept_for(unbroken):
    folder, _ = unbroken
    batches = json.loads((folder / "best.json").read_text())["batches"]
    assert resolve(folder / "best") == folder / "checkpoints" / f"{batches:08d}"
    model = cm_jax.load(folder / "best")
    reference = of_dataset(EmojiData().open(8), "emoji")
    again, _ = evaluate(toy(), of_model(model, model.plan(steps=2), 16), reference)
    best = min(row["fid_2_steps"] for row in table(folder))
    assert again.values["fid"] == pytest.approx(best, rel=1e-6)


class Killed(BaseException):
    """As SIGKILL: nothing is caught and nothing tidied up by what it ends, but checkpoints under way."""


def killed(patch, owner, name, call):
    """`owner.name` ends the run at its call number `call`."""
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments):
        if next(calls) == call:
            raise Killed
        return original(*arguments)

    patch.setattr(owner, name, dying)


MOMENTS = [
    (Evaluator, "evaluate", 1),  # within the first evaluation
    (RunFolder, "mark_best", 1),  # it is made, and not yet told
    (MetricsLog, "evaluation", 1),  # the best is marked, and the row not yet written
    (OneDevice, "place_batches", 4),  # after the evaluation of batch 6 and before the next checkpoint
    (Evaluator, "evaluate", 2),  # in the evaluation at the end, when nothing is left to train
]


def test_a_run_that_is_stopped_and_killed_around_evaluations_becomes_the_unbroken_one(unbroken, tmp_path):
    run, goes_on = tmp_path / "run", []
    stop_after(3, lambda: train(EVALUATED, run, goes_on.append))  # SIGTERM: what is due then is left for later
    assert not (run / "evaluations.csv").exists()
    for owner, name, call in MOMENTS:
        with pytest.MonkeyPatch.context() as patch:
            killed(patch, owner, name, call)
            with pytest.raises(Killed):
                train(EVALUATED, run, goes_on.append)
    train(EVALUATED, run, goes_on.append)
    starts = [line.partition(":")[0] for line in goes_on if line.startswith(("Starting", "Resuming"))]
    assert starts == ["Starting"] + [f"Resuming after batch {batches}" for batches in (3, 3, 3, 3, 6, 12)]
    assert_same_run(run, unbroken[0], 12)
    for name in ("evaluations.csv", "best.json"):
        assert (run / name).read_bytes() == (unbroken[0] / name).read_bytes()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        path.name for path in sorted((unbroken[0] / "checkpoints").iterdir())
    ]
    train(EVALUATED, run, goes_on.append)
    assert "is finished" in goes_on[-1]


def test_evaluation_can_start_later_but_not_change(unbroken, tmp_path):
    run, short = tmp_path / "run", dataclasses.replace(EVALUATED, images=8 * 3)
    train(dataclasses.replace(short, evaluation=None), run, quiet)
    assert resolve(run).name == "00000003"
    with pytest.raises(InputError, match=r"has been evaluated \(--evaluation\)"):
        resolve(run / "best")
    train(short, run, quiet)
    assert table(run) == table(unbroken[0])[:1]
    train(dataclasses.replace(short, evaluation=None), run, quiet)
    other = dataclasses.replace(EVALUATED.evaluation, count=17, every=1000)
    with pytest.raises(InputError, match=r"(?s)other settings.*count: 16 in the folder, 17 now\nGive.*best.json away"):
        train(dataclasses.replace(short, evaluation=other), run, quiet)


class Scripted(Evaluator):
    """Finds what it is told to find."""

    scores = iter(())

    def evaluate(self, params, reference):
        del params, reference
        return {self.best_column: next(self.scores)}, "a score"


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("fid", [7, 3, 5, 3, 6], 20),
        ("is", [1, 8, 3, 9, 2], 40),
        ("kid", [math.nan, -1, -2, math.inf, math.nan], 30),
        ("fid", [math.nan] * 5, None),
    ],
)
def test_the_best_is_the_least_or_the_most_and_is_kept(metric, scores, best, tmp_path, monkeypatch):
    chosen = dataclasses.replace(SMALL, batch_size=1, images=50)
    chose = PeriodicEvaluation(every=10, metrics=(metric,))
    evaluator = Scripted(chose, CONFIG, toy(), of_dataset(EmojiData().open(8), "emoji"))
    monkeypatch.setattr(Scripted, "scores", iter(map(float, scores)))
    with RunFolder(tmp_path, Retention(keep_last=1)) as folder, MetricsLog(tmp_path, tensorboard=False) as log:
        evaluations = EvaluationHook(chosen, evaluator, folder, 0)
        evaluations.start()
        for done in range(1, 51):
            assert evaluations.due(done) == (done % 10 == 0)
            if evaluations.due(done):
                folder.save(done, CONFIG, PARAMS, {"a": np.float32(done)})
                evaluations.evaluate(done, PARAMS, log)
                assert not evaluations.due(done)
        folder.wait()
        assert folder.best() == best
        assert folder.steps() == sorted({best or 50, 50})
        again = EvaluationHook(chosen, evaluator, folder, 50)
        assert (again._last, again._best) == (50, evaluations._best)


def test_a_larger_batch_size_causes_no_evaluation_before_its_images(tmp_path):
    """Batches of 8 images, evaluated after 24 images, and of 16 from batch 5 on, where the next is due after 48."""
    larger = dataclasses.replace(SMALL, batch_size=16, image_offset=-5 * 8, images=1000)
    evaluator = Scripted(PeriodicEvaluation(every=24), CONFIG, toy(), of_dataset(EmojiData().open(8), "emoji"))
    (tmp_path / "evaluations.csv").write_text("batches,images,fid_1_step\n3,24,7\n")
    with RunFolder(tmp_path) as folder:
        hook = EvaluationHook(larger, evaluator, folder, 5)
        assert [(done, larger.images_after(done), hook.due(done)) for done in (5, 6)] == [(5, 40, False), (6, 56, True)]


def test_the_evaluated_ema_is_the_one_saved_for_sampling(tmp_path):
    short = dataclasses.replace(EVALUATED, images=8 * 3)
    assert short.sampled_ema == "exponential_0.9"
    for name, branch in (("power_0.1", "ema/power_0.1"), ("none", "params"), ("0.99", "ema/exponential_0.99")):
        chosen = dataclasses.replace(EVALUATED.evaluation, ema=name, steps=(2,), metrics=("fid",))
        train(dataclasses.replace(short, evaluation=chosen), tmp_path / name, quiet)
        kernel = cm_jax.load(tmp_path / name / "best").params["mlp"]["in"]
        np.testing.assert_array_equal(kernel, arrays(tmp_path / name, 3)[f"{branch}/mlp/in"])
    with pytest.raises(InputError, match=r'evaluation.ema: "power_0.1" in the folder, "exponential_0.9" now'):
        train(short, tmp_path / "power_0.1", quiet)
    with pytest.raises(InputError, match=r"0.9 or .*none, got 'power_0.2'"):
        dataclasses.replace(short, evaluation=PeriodicEvaluation(ema="power_0.2"))


def test_a_dry_run_tells_of_it():
    lines = itertools.takewhile(lambda line: not line.startswith("memory"), report(prepare(EVALUATED)))
    told = [line for line in lines if line.startswith("evaluation  ")]
    assert len(told) == 1
    assert "every 24 images; the best is kept by fid_2_steps" in told[0]


SMALL_WORDS = [
    *("--network.image-size", "8", "--network.base-channels", "16", "--network.channel-mult", "1"),
    *("--network.blocks-per-level", "1", "--parallel", "one", "--compilation-cache", "off"),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--metrics", "fid", "pr", "--count", "3"],
            "pr needs at least 4 images; the evaluation (--evaluation.count)",
        ),
        (["--metrics", "is", "--count", "5"], "no classifier"),
        (["--metrics", "pr"], "first metric chooses the best checkpoint: expected one of fid, sfid, kid, is, got pr"),
        (["--metrics", "fid", "fidd"], "fidd"),
        (["--metrics", "fid", "fid"], "each once"),
        (["--metrics", "fid", "pr", "prdc"], "choose one of them"),
        (["--count", "1"], "count must be a whole number from 2"),
        (["--steps", "0"], "steps must be a whole number from 1"),
        (["--steps", "2", "2"], "Expected different numbers of steps, got 2, 2"),
        (["--ema", "power"], "Expected evaluation.ema to be 0.9"),
        (["--reference", "emojis"], "There are no images emojis"),
    ],
)
def test_invalid_evaluations_are_refused_before_anything_is_written(words, message, tmp_path, capsys):
    named = [f"--evaluation.{word[2:]}" if word.startswith("--") else word for word in words]
    run = tmp_path / "run"
    said = failed(
        capsys, main_train, "emoji32-edm", "--run", run, *SMALL_WORDS, "--evaluation", "periodic-evaluation", *named
    )
    assert message in said
    assert not run.exists()


def test_missing_inception_weights_are_reported_with_instructions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation_hook, "load_inception", load_inception)
    monkeypatch.delenv("CM_JAX_INCEPTION", raising=False)
    run = tmp_path / "run"
    said = failed(capsys, main_train, "emoji32-edm", "--run", run, *SMALL_WORDS, "--evaluation", "periodic-evaluation")
    assert "CM_JAX_INCEPTION is not set. Create the file once:" in said
    assert not run.exists()
