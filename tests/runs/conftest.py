"""Fixtures of several files."""

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    """Training compiles equal steps once, resizes the emoji once, and neither plots nor samples.

    `teacher` does both, and `sampled_runs` samples.
    """
    from cm_jax.data import EmojiData
    from cm_jax.training import loop
    from cm_jax.training.setup import TrainingSetup

    compiled, programs = TrainingSetup.compiled, {}

    def once(setup):
        key = (setup.step, setup.parallelism, *setup.parallelism.devices)
        if key not in programs:
            programs[key] = compiled(setup)
            if len(programs) > 8:
                del programs[next(iter(programs))]
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSetup, "compiled", once)
        patch.setattr(EmojiData, "open", functools.lru_cache(maxsize=8)(EmojiData.open))
        patch.setattr(loop, "plot", lambda folder: None)
        patch.setattr(loop, "sample_grid", lambda config, params: Image.new("RGB", (8, 8)))
        yield


@pytest.fixture(scope="module")
def sampled_runs():
    """Runs write samples, as for users."""
    from cm_jax.training import loop
    from cm_jax.training.run.evaluation_hook import sample_grid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "sample_grid", sample_grid)
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a finished run with all its files, and what it said. Tests do not change it."""
    from cm_jax.training import loop
    from cm_jax.training.run.evaluation_hook import sample_grid
    from cm_jax.training.run.plots import plot
    from tests.runs.test_training import SMALL

    folder, said = tmp_path_factory.mktemp("runs") / "teacher", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot", plot)
        patch.setattr(loop, "sample_grid", sample_grid)
        loop.train(dataclasses.replace(SMALL, sample_every=12, ema_snapshot_every=6), folder, said.append)
    return folder, said


@pytest.fixture(scope="module")
def without_pictures():
    """Runs without plots and grids of samples, which take longer than a few training steps."""
    from cm_jax.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot", lambda run: None)
        patch.setattr(loop, "sample_grid", lambda *arguments: np.zeros((1, 8, 8, 3), np.uint8))
        yield
