"""Files that the code wrote before its names changed (tests/data/format1) still load, sample and resume."""

import csv
import dataclasses
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import cm_jax
from cm_jax import kernels
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.serialization import encode, from_text, to_text
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.evaluation import FeatureExtractor
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.optimizers import ConstantRate
from cm_jax.training.run import evaluation_hook
from cm_jax.training.run.history import FORMAT
from cm_jax.training.setup import prepare
from tests.laws.test_evaluation import toy_features
from tests.support import DATA, relative

FORMER = DATA / "format1"
MODELS = sorted(path.stem for path in (FORMER / "models").glob("*.npz"))
FROM_EDM_FILES = ("cifar10-cd", "cifar10-ect", "imagenet64-ect", "imagenet64-sct", "imagenet64-scd")
RUNS = sorted(path.name for path in (FORMER / "runs").iterdir() if path.is_dir())
FIELDS = json.loads((FORMER / "settings" / "fields.json").read_text())


def train_config(text):
    return from_text(text, TrainConfig, FORMAT, "config.json", "the config of a run")


def config_of(record, which):
    fields = dict(record[which])
    if record["kind"] == "Karras" and which == "changed":  # the preconditioning must agree
        fields["scaling"] = {"kind": "EDMScaling", "sigma_data": record["value"]}
    text = json.dumps({"format": 1, **fields})
    return train_config(text) if record["file"] == "Training" else ModelConfig.from_json(text, "config.json")


def plain_values(encoded):
    """Every number and string in encoded settings."""
    if isinstance(encoded, dict | list):
        items = encoded.values() if isinstance(encoded, dict) else encoded
        return [value for item in items for value in plain_values(item)]
    return [encoded]


# configs


EMOJI_DROPOUT = {"edm": 0.1, "ict": 0.2, "ect": 0.2, "sct": 0.2, "meanflow": 0.1}


def former_preset(name):
    """A preset as it was: the emoji presets had a larger network, batches of 128 and five times as many steps; those of
    CIFAR-10 had no augmentation.
    """
    now = PRESETS[name]()
    family, method = name.split("-", 1)
    if family == "cifar10":
        return replace(now, network=replace(now.network, augment_dim=0), augmentation=None)
    if family != "emoji32":
        return now
    objective, rate = now.objective, now.optimizer.learning_rate
    warm_up = 5 * rate.warm_up if method == "meanflow" else rate.warm_up
    for field, length in (("curriculum", "steps"), ("gap", "steps_per_stage"), ("warm_up", "steps")):
        schedule = getattr(objective, field, None)
        if hasattr(schedule, length):
            longer = replace(schedule, **{length: 5 * getattr(schedule, length)})
            objective = replace(objective, **{field: longer})
    if method == "sct":
        objective, rate = replace(objective, noise_distribution=LogNormal(-1.0, 1.8)), ConstantRate(2e-4)
    if method == "ct":
        objective = replace(objective, curriculum=replace(objective.curriculum, start=2, end=150))
    larger = {"base_channels": 64, "channel_mult": (1, 2, 2), "blocks_per_level": 2}
    return replace(
        now,
        network=replace(now.network, **larger, dropout=EMOJI_DROPOUT.get(method, 0.0)),
        objective=objective,
        optimizer=replace(now.optimizer, learning_rate=replace(rate, peak=rate.peak / 2, warm_up=warm_up)),
        batch_size=128,
        images=6_400_000,
        ema_decay=(0.999, 0.9999),
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in (FORMER / "configs").glob("*.json")))
def test_config_of_a_preset(name):
    """Former configs are the former presets, but for the presets that start from EDM's and EDM2's files by now."""
    config = train_config((FORMER / "configs" / f"{name}.json").read_text())
    if name not in FROM_EDM_FILES:
        assert config == former_preset(name)
    assert type(config.objective) is type(PRESETS[name]().objective)
    assert train_config(to_text(config, FORMAT)) == config


@pytest.mark.parametrize("record", FIELDS, ids=[f"{record['kind']}.{record['field']}" for record in FIELDS])
def test_every_field_is_read(record):
    default, changed = config_of(record, "default"), config_of(record, "changed")
    assert default != changed
    if isinstance(record["value"], int | float) and not isinstance(record["value"], bool):
        assert record["value"] in plain_values(encode(changed))


def test_fields_are_complete():
    names = json.loads((FORMER / "settings" / "legacy_keys.json").read_text())["kinds"]
    recorded = {(record["kind"], record["field"]) for record in FIELDS}
    assert recorded == {(kind, field) for kind, fields in names.items() for field in fields}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("target_curriculum", "curriculum"),
        ("target_without_curriculum", "curriculum"),
        ("preconditioning_sigma_min", "sigma_min"),
        ("grid_levels", "levels"),
        ("grid_curve", "sigma_max"),
    ],
)
def test_contradictory_config_is_refused(name, message):
    with pytest.raises(cm_jax.InputError, match=message):
        prepare(train_config((FORMER / "contradictory" / f"{name}.json").read_text()))


# models


def rounded_otherwise(model):
    """The model with every parameter changed by about half a unit in the last place.

    Rounding differs between kinds of processors, and the denoiser of random weights amplifies it to 4e-5.
    """
    signs = np.random.default_rng(0)

    def change(leaf):
        return np.asarray(leaf) * (1 + 6e-8 * signs.choice([-1, 1], leaf.shape)).astype(np.float32)

    return dataclasses.replace(model, params=jax.tree.map(change, model.params))


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    with np.load(FORMER / "models" / f"{name}.npz") as file:
        recorded = dict(file)
    labels = recorded.get("labels")
    places = sorted(path for path in (FORMER / "models").glob(f"{name}*") if path.suffix != ".npz")
    assert len(places) >= 3
    for place in places:
        model = cm_jax.load(place)
        with kernels.off():
            denoised = model.denoise(recorded["images"], recorded["sigma"], labels)
            assert relative(denoised, recorded["denoised"]) < 1e-6
    with kernels.off():
        assert relative(model.sample(0, 2), recorded["sample"]) < 1e-6
        samples = model.sample(0, 2, steps=3)
        rounding = relative(rounded_otherwise(model).sample(0, 2, steps=3), samples)
        assert relative(samples, recorded["sample_3_steps"]) < max(1e-5, 3 * rounding)
        if "sample_2_steps" in recorded:  # at the tuned timesteps, of a class by name
            found = model.sample(0, 2, steps=2, labels="king penguin")
            assert relative(found, recorded["sample_2_steps"]) < 1e-6


# runs


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of the run folders in the working folder, where their configs look for teachers."""
    shutil.copytree(FORMER / "runs", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluation_hook, "load_inception", toy)
    return tmp_path


def toy(weights=""):
    """The feature extractor with which run `evaluated` was recorded."""
    del weights
    mix = np.random.default_rng(5).normal(size=(8 * 8 * 3, 16)).astype(np.float32)
    return FeatureExtractor(toy_features, {"mix": mix, "logits": np.zeros(1, np.float32)}, "a toy", "no resizing")


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run(name, runs):
    """Three more batches give the parameters, state and metrics that the former code gave."""
    recorded = json.loads((runs / f"{name}.resumed.json").read_text())
    with np.load(runs / f"{name}.resumed.npz") as file:
        arrays = dict(file)
    folder = runs / name
    config = train_config((folder / "config.json").read_text())
    with kernels.off():
        assert relative(cm_jax.load(folder).sample(0, 2, steps=2), arrays["sample"]) < 1e-5
        train(dataclasses.replace(config, images=recorded["batches"] * config.batch_size), folder, lambda line: None)
    # Adam divides near-zero gradients by their own size, so that rounding moves single parameters by up to 3e-5 here.
    assert relative(flat(cm_jax.load(folder).params), arrays["params"]) < 1e-4
    # The former rate of PD was that of the whole run, but its optimizer restarted with every stage, as its count says.
    assert_same_table(folder / "metrics.csv", recorded["metrics"], {"learning_rate"} if name == "pd" else set())
    assert_same_state(folder / "checkpoints" / f"{recorded['batches']:08d}" / "state" / "state.npz", recorded["state"])
    if "evaluations" in recorded:
        assert_same_table(folder / "evaluations.csv", recorded["evaluations"])
        assert json.loads((folder / "best.json").read_text())["batches"] == recorded["best"]


def flat(params):
    """All parameters in the order of their names, as one vector."""
    leaves = {}

    def walk(tree, above):
        for name, item in tree.items():
            if isinstance(item, dict):
                walk(item, f"{above}{name}/")
            else:
                leaves[above + name] = np.ravel(item)

    walk(params, "")
    return np.concatenate([leaves[name] for name in sorted(leaves)])


def assert_same_table(file, recorded, without=frozenset()):
    with file.open() as text:
        rows = list(csv.DictReader(text))
    assert len(rows) == len(recorded)
    for row, expected in zip(rows, recorded, strict=True):
        for column, value in ((name, expected[name]) for name in expected.keys() - without):
            found = float(row[column] or "nan")
            assert found == pytest.approx(float(value or "nan"), rel=1e-4, abs=1e-6, nan_ok=True), column


def assert_same_state(file, recorded):
    """The arrays have the recorded shapes and norms, whatever their names are."""
    with np.load(file) as state:
        names = [name for name in state.files if name != "leaves.json"]
        arrays = [state[name] for name in names]
    expected = {}
    for leaf in recorded.values():
        expected.setdefault((leaf["dtype"], tuple(leaf["shape"])), []).append(leaf["norm"])
    found = {}
    for array in arrays:
        norm = float(np.linalg.norm(array.astype(np.float64).ravel()))
        found.setdefault((str(array.dtype), array.shape), []).append(norm)
    assert set(found) == set(expected)
    for kind, norms in expected.items():
        np.testing.assert_allclose(sorted(found[kind]), sorted(norms), rtol=1e-4, atol=1e-8, err_msg=str(kind))
