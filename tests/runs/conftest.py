"""Fixtures of several files."""

import dataclasses

import pytest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a finished run, and what it said."""
    from cm_jax.training.loop import train
    from tests.runs.test_training import SMALL

    folder, said = tmp_path_factory.mktemp("runs") / "teacher", []
    train(dataclasses.replace(SMALL, sample_every=12, ema_snapshot_every=6), folder, said.append)
    return folder, said
