"""Long work announces itself: what is shown, when, and that no long phase is forgotten."""

import contextlib
import functools
import importlib.util
import io
import logging
import sys
import threading
import types

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cm_jax import progress
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli.running import _Messages
from cm_jax.data import ImageFolder, InMemory, NpzData
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.editing import Luma
from cm_jax.evaluation import evaluate, evaluate_bits
from cm_jax.evaluation.level_search import tune
from cm_jax.model import Model
from cm_jax.progress import activity, counted
from tests.laws.test_evaluation import image_set, toy_extractor
from tests.support import announced
from tests.toy import ToyNetwork


@pytest.fixture
def messages(monkeypatch):
    """A function that waits for so many messages of a command without a terminal, and returns all so far."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    text, arrived = io.StringIO(), threading.Semaphore(0)

    class Recorded(_Messages):
        def emit(self, record):
            with contextlib.redirect_stderr(text):
                super().emit(record)
            arrived.release()

    handler = Recorded()
    progress.log.addHandler(handler)
    level = progress.log.level
    progress.log.setLevel(logging.INFO)  # an assignment would keep cached answers of isEnabledFor
    yield lambda count: [arrived.acquire(timeout=10) for _ in range(count)] and text.getvalue().splitlines()
    progress.log.setLevel(level)
    progress.log.removeHandler(handler)


def test_an_activity_is_announced_before_it_ends_and_now_and_then(messages):
    with activity("Compiling", "usually 10 s") as shown:
        first, second = messages(2)[:2]
        assert first == "Compiling (usually 10 s) ..."
        assert second == "Compiling (usually 10 s), 0:00:00 so far."
        shown.total, shown.unit = 10, "files"
        shown.advance(5)
        assert messages(3)[-1] == "Compiling (usually 10 s): 5 of 10 files, 0:00:00 so far, about 0:00:00 left."


def test_only_the_innermost_activity_repeats_its_message(messages):
    with activity("Outer"):
        assert messages(1) == ["Outer ..."]
        with activity("Inner \x1b[31m"):
            lines = messages(6)
    assert lines.count("Inner \\x1b[31m ...") == 1
    assert {line.partition(",")[0] for line in lines[-3:]} == {"Inner \\x1b[31m"}


def test_short_activities_and_those_without_a_listener_are_silent(capsys, caplog):
    with activity("Short"):
        pass
    assert list(counted([[1, 2], [3]], 3, "Counted")) == [[1, 2], [3]]
    with caplog.at_level(logging.INFO), activity("Short"):
        pass
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_a_terminal_shows_one_live_line(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    written = threading.Event()

    class Terminal(io.StringIO):
        def write(self, text):
            if "Sampling" in text:
                written.set()
            return super().write(text)

    file = Terminal()
    monkeypatch.setattr(progress, "terminal", lambda: Console(file=file, force_terminal=True, width=100))
    with progress.on_terminal(), activity("Outer"), activity("Sampling", total=100) as shown:
        shown.advance(25)
        assert written.wait(10)
    assert "Sampling: 25 of 100 images, 0:00:00 so far, about 0:00:00 left" in file.getvalue()
    assert file.getvalue().endswith("\x1b[1A\x1b[2K")  # erased at the end


def test_every_long_phase_of_sampling_editing_and_evaluating_announces_itself(unchecked_types):
    params = ToyNetwork().initialize(jax.random.key(0))
    student = Model(ModelConfig(ToyNetwork(), ConsistencyPreconditioning(), num_levels=4), params)
    denoiser = Model(ModelConfig(ToyNetwork(), EDMPreconditioning()), params)
    images, labels = np.zeros((2, 4, 4, 3), np.float32), [0, 1]
    reference, pixels = image_set(0, 30)
    phases = {
        "Sampling: 0 of 2 images": functools.partial(student.sample, 0, 2),
        "Editing: 0 of 2 images": functools.partial(student.edit, 0, images, Luma(), labels=labels, steps=1),
        "Interpolating: 0 of 2 images": functools.partial(student.interpolate_noise, 0, 1, 2, labels=labels),
        "Evaluating images: 0 of 30 images": functools.partial(evaluate, toy_extractor(), reference, reference),
        "Evaluating a model: 0 of 20 images": functools.partial(
            tune, toy_extractor(), student, reference, steps=2, count=20
        ),
        "Evaluating the likelihood: 0 of 2 images": functools.partial(
            evaluate_bits, denoiser, InMemory(pixels, np.arange(30) % 3), 2, steps=1
        ),
    }
    for expected, phase in phases.items():
        with announced() as activities:
            phase()
        assert expected in activities, (expected, activities)
        assert any(each.startswith("Compiling the ") for each in activities), activities


def test_reading_and_decoding_images_announce_themselves(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    np.savez(tmp_path / "some.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    with announced() as activities:
        ImageFolder(str(tmp_path)).open(8)
        NpzData(str(tmp_path / "some.npz")).open(4)
    assert activities == [
        "Listing the images",
        f"Decoding {tmp_path}: 0 of 3 images",
        f"Reading {tmp_path / 'some.npz'}",
        "Resizing: 0 of 3 images",
    ]


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_live_lines_only_with_ipywidgets(widgets, monkeypatch):
    """Without it, rich shows a warning and no progress."""
    kernel = types.SimpleNamespace(IPKernelApp=types.SimpleNamespace(initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", kernel)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if widgets else None)
    assert (progress.terminal() is not None) == widgets
