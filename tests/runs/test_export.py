"""Exported samplers: the images of the model, without this package."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

import cm_jax
from cm_jax import exporting
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.samplers import Churn, Heun
from cm_jax.types import digest
from tests.runs.test_commands import failed, succeeded
from tests.support import SMALL, random_params

pytestmark = pytest.mark.usefixtures("unchecked_types")  # the symbolic number of images is not an int

BOUND = 1e-5
TINY = dataclasses.replace(SMALL, image_size=8, channel_mult=(1,), attention_factors=(1,), classes=3)
NAMES = ("cat", "dog", "king penguin, Aptenodytes")
CONFIG = ModelConfig(TINY, ConsistencyPreconditioning(), num_levels=18, class_names=NAMES)
MODEL = Model(CONFIG, TINY.prepare(random_params(TINY)))
SEEDS, CLASSES = [3, 2**32 - 1, 0], [2, 0, 1]
needs_flatbuffers = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None, reason="not installed: flatbuffers (pip install '.[export]')"
)


def test_exported_and_direct_images_agree():
    """For any number of images."""
    program, params = exporting.exported(MODEL, MODEL.plan(steps=2))
    assert program.platforms == ("cpu", "cuda", "tpu")
    call = jax.jit(program.call)
    for count in (3, 1):
        seeds, labels = np.array(SEEDS[:count], np.uint32), np.array(CLASSES[:count], np.int32)
        expected = MODEL.sample(seeds=SEEDS[:count], labels=CLASSES[:count], steps=2)
        np.testing.assert_allclose(call(params, seeds, labels), expected, atol=BOUND)


def test_the_parameters_of_both_networks_of_a_guided_sampler():
    free = dataclasses.replace(TINY, classes=None)
    guide, denoiser = (
        Model(ModelConfig(network, EDMPreconditioning(), num_levels=18), network.prepare(random_params(network, 1)))
        for network in (free, TINY)
    )
    guided = {"sigmas": [10.0], "guidance": 1.5, "guide": guide, "sampler": "euler"}
    program, params = exporting.exported(denoiser, denoiser.plan(**guided), ["cpu"])
    expected = denoiser.sample(seeds=SEEDS, labels=CLASSES, **guided)
    found = program.call(params, np.array(SEEDS, np.uint32), np.array(CLASSES, np.int32))
    np.testing.assert_allclose(found, expected, atol=BOUND)
    plan = denoiser.plan(**guided | {"sampler": Heun(churn=Churn(40)), "guidance_interval": (0.28, 2.9)}, clip=False)
    readme = exporting._readme(denoiser, plan, program)
    assert "- Sampler: Heun(churn=Churn(amount=40, " in readme
    described = (
        f"not clipped, guidance 1.5 by the model of SHA-256 {digest(guide.params)[:12]} for sigma in (0.28, 2.9]"
    )
    assert f"- Denoised images: {described}\n" in readme


@needs_flatbuffers
def test_the_example_runs_without_this_package(tmp_path, capsys):
    MODEL.save(tmp_path / "model.safetensors")
    said = succeeded(capsys, main, "export", tmp_path / "model.safetensors", tmp_path / "out", "--steps", 2)
    assert "for cpu, cuda, tpu" in said
    example = tmp_path / "out" / "example.py"
    code = f"import runpy, sys; sys.modules['cm_jax'] = None; runpy.run_path({str(example)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    expected = MODEL.sample(seeds=range(4), labels=0, steps=2)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=BOUND)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "class numbers from 0 to 2" in readme
    assert "\n- Precision of the network: float32\n" in readme
    assert readme.endswith("## Classes\n0. cat\n1. dog\n2. king penguin, Aptenodytes\n")
    assert "Consistency, noise levels 80, " in readme
    assert "- Denoised images: clipped to [-1, 1]\n" in readme
    assert "is a folder with files in it" in failed(capsys, main, "export", "emoji32", tmp_path / "out")


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Expected platforms among cpu, cuda, tpu, got \\['gpu'\\]"):
        cm_jax.export(MODEL, tmp_path / "out", platforms=["gpu"])
    with pytest.raises(InputError, match="Expected a Model"):
        cm_jax.export("emoji32", tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install flatbuffers"):
        cm_jax.export(MODEL, tmp_path / "out")
    assert not list(tmp_path.iterdir())
