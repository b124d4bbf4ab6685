"""The examples of docs/extending.md and README.md: executed in their order, with a tiny model and a toy Inception."""

import dataclasses
import itertools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax import evaluation
from cm_jax.checkpoints import registry
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import EmojiData, Generated
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.evaluation import FeatureExtractor
from cm_jax.networks import BaseNetwork
from cm_jax.training import TrainingSetup, loop, train
from cm_jax.training.run.metrics_log import read_metrics
from tests.laws.test_evaluation import toy_features
from tests.runs.test_training import SMALL
from tests.support import ROOT
from tests.tiny import Tiny

BLOCKS, README = (
    re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for page in ("docs/extending.md", "README.md")
)
CALLS: list[tuple[int, dict[str, float]]] = []
LOAD = cm_jax.load


class Emoji(Tiny):
    def shapes(self):
        return jax.eval_shape(self.initialize, jax.random.key(0))

    def initialize(self, key):
        return Tiny().initialize(key) | {"table": jax.random.normal(key, (9, 8))}


def load(name, **options):
    """A tiny model of emoji, with random weights, in place of the bundled one."""
    if name != "emoji32":
        return LOAD(name, **options)
    network, names = Emoji(image_shape=(32, 32, 3), classes=9), EmojiData().open(32).class_names
    config = ModelConfig(network, ConsistencyPreconditioning(), class_names=names)
    return cm_jax.Model(config, network.initialize(jax.random.key(0)))


def toy_inception(weights):
    rng = np.random.default_rng(5)
    return FeatureExtractor(toy_features, {"mix": rng.normal(size=(192, 16)).astype(np.float32)}, weights, "none")


@pytest.mark.parametrize("precise", [True, False])
def test_a_network_of_your_own_computes_in_the_precision_asked_for_if_it_is_a_setting(precise):
    fields = [("image_shape", tuple, (4, 4, 1))] + [("precision", str, "float32")] * precise
    methods = {"initialize": None, "predict": None}
    made = dataclasses.make_dataclass("Own", fields, bases=(BaseNetwork,), frozen=True, namespace=methods)()
    half = made.at_precision("bfloat16")
    assert half.precision == ("bfloat16" if precise else "float32")
    assert half.at_precision("float32") == made


def test_examples_are_short():
    assert len(BLOCKS) > 10
    assert max(len(block.splitlines()) for block in BLOCKS) < 40


def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cm_jax, "load", load)
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(README):
        if "openai/" not in block:  # a model on the Hub
            exec(compile(block, f"example {number} of README.md", "exec"), names)
    assert (tmp_path / "emoji.png").exists()
    expected = load("emoji32").sample(0, 4, labels=[8, 3, 0, 0], steps=2)
    np.testing.assert_allclose(names["images"], expected, atol=1e-4)


@pytest.mark.usefixtures("unchecked_types")
def test_examples_run(tmp_path, monkeypatch, capsys):
    wandb = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda values, step: CALLS.append((step, values)))
    wandb.init = lambda project: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(cm_jax, "load", load)
    monkeypatch.setattr(evaluation, "load_inception", toy_inception)
    monkeypatch.setattr(loop, "plot", lambda run: None)
    monkeypatch.setattr(loop, "sample_grid", lambda config, params: Image.new("RGB", (8, 8)))
    monkeypatch.chdir(tmp_path)
    own = types.ModuleType("my_components")
    monkeypatch.setitem(sys.modules, "my_components", own)
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"example {number} of docs/extending.md", "exec"), own.__dict__)

    emoji = load("emoji32")
    np.testing.assert_allclose(own.many[1], emoji.sample(own.seeds[1], 2, labels=[0, 4], steps=2), atol=1e-4)
    assert isinstance(own.gradient, cm_jax.Model)
    assert own.estimates.shape == (2, 32, 32, 3)

    assert [batches for batches, _ in CALLS] == [1, 2, 3, 4]
    assert CALLS[0][1]["images"] == 8
    rows = read_metrics(tmp_path / "runs" / "colors" / "metrics.csv")[1]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "events").iterdir())
    assert own.setup.config.data == own.Noise()
    assert own.batches == 3
    assert own.student_model.sample(0, 2, steps=2).shape == (2, 8, 8, 3)
    assert own.report.values.keys() == {"fid", "kid", "kid_deviation"}
    assert own.images.shape == (3, 8, 8, 3)
    assert own.again.config == own.model.config

    for network in (own.MLP(), own.NNXNet(), own.LinenNet(classes=2)):
        check_network(network)
    colors, grains = own.Colors().open(8), own.GrainColors().open(8)
    for seed, start in ((0, 0), (3, 9)):
        pairs = zip(grains.batches(4, seed, start), grains.batches(4, seed, start, 1, 2), strict=False)
        for (images, labels), (half, half_labels) in itertools.islice(pairs, 2):
            assert images.shape == (4, 8, 8, 3)
            np.testing.assert_array_equal(images[2:], half)
            np.testing.assert_array_equal(labels[2:], half_labels)
            assert all(image[..., label].mean() > 150 for image, label in zip(images, labels, strict=True))
    ahead = itertools.islice(grains.batches(4), 2, 3)
    np.testing.assert_array_equal(next(ahead).images, next(grains.batches(4, start=2)).images)
    renumbered = next(grains.renumbered(np.array([2, 0, 1], np.int32), ("g", "b", "r"), "otherwise").batches(4))
    np.testing.assert_array_equal(renumbered.labels, np.array([2, 0, 1])[next(grains.batches(4)).labels])
    assert colors.class_names == grains.class_names

    registry._registered.clear()
    with pytest.raises(InputError, match="unknown network 'LinenNet', saved from the module my_components"):
        LOAD("colors")
    with pytest.raises(InputError, match=r"Noise, and files .*: cm_jax.register\(Noise\)"):
        train(own.student, tmp_path / "refused" / "run")
    assert not (tmp_path / "refused").exists()


def check_network(network):
    """Its output and its parameters have the right shapes, and parameters have gradients."""
    params, x = network.initialize(jax.random.key(1)), jnp.ones((2, 8, 8, 3))
    labels = None if network.classes is None else jnp.array([0, 2])  # the last stands for no label

    def total(params):
        output = network.predict(params, x, jnp.ones(2), labels)
        assert output.shape == x.shape
        return output.sum()

    gradient = jax.grad(total)(params)
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert jax.tree.structure(gradient) == jax.tree.structure(network.shapes())


def test_a_start_that_fails_while_it_compiles_leaves_no_folder(tmp_path, monkeypatch):
    def fail(setup):
        raise MemoryError

    monkeypatch.setattr(TrainingSetup, "compiled", fail)
    with pytest.raises(MemoryError):
        train(dataclasses.replace(SMALL, batch_size=8), tmp_path / "runs" / "one", print_line=lambda line: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("batch", "message"), [
    ((np.zeros((4, 8, 8, 3)), np.zeros(4, int)), "expected uint8 images .4, 8, 8, 3., got float64"),
    ((np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, int)), r"got uint8 \[3, 8, 8, 3\]"),
    ((np.zeros((4, 8, 8, 3), np.uint8), None), "expected 4 labels below 2"),
    ((np.zeros((4, 8, 8, 3), np.uint8), np.full(4, 2)), "expected 4 labels below 2"),
    (None, "a generator ended"),
])  # fmt: skip
def test_batches_of_a_generator_that_do_not_fit(batch, message):
    data = Generated(lambda *_: iter([] if batch is None else [batch]), (8, 8, 3), 4, classes=2)
    with pytest.raises(InputError, match=message):
        next(data.batches(4))
