"""--key and --ema: which network and which EMA every command and `load` read, and what they print about it."""

import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import cm_jax
from cm_jax import cli, conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.state_archive import STATE
from cm_jax.cli import demo, export
from cm_jax.cli.options import WhichWeights
from cm_jax.errors import InputError
from cm_jax.objectives import Denoising
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.dry_run import report
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.setup import prepare
from cm_jax.training.step import TrainState
from tests.runs.test_training import SMALL, UNET
from tests.runs.test_training_setup import STUDENT
from tests.support import EMOJI, ROOT

NETWORK = dataclasses.replace(UNET, base_channels=8)
CONFIG = ModelConfig(NETWORK, SMALL.preconditioning)
VALUES = {"exponential_0.9": 2.0, "exponential_0.99": 3.0, "power_0.1": 4.0}


def full(value):
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), NETWORK.shapes())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which all parameters have one value, and every EMA another."""
    path = tmp_path_factory.mktemp("runs") / "run"
    emas = {name: full(value) | {"weight": jnp.zeros(3)} for name, value in VALUES.items()}
    zero, params = jnp.int32(0), full(1.0) | {"weight": jnp.zeros(3)}  # with a parameter of the objective
    with RunFolder(path) as folder:
        for batches in (4, 8):
            state = TrainState(jnp.int32(batches), zero, zero, params, {"moment": full(0.0)}, None, None, emas)
            folder.save(batches, CONFIG, full(VALUES["exponential_0.9"]), state)
        folder.mark_best(4, 1.0)
    return path


def value(params):
    (found,) = {float(number) for leaf in jax.tree.leaves(params) for number in np.unique(leaf)}
    return found


@pytest.mark.parametrize(
    ("ema", "expected"),
    [
        (None, 2.0),
        ("0.9", 2.0),
        (0.99, 3.0),
        ("exponential_0.990", 3.0),
        ("power_0.1", 4.0),
        ("none", 1.0),
        ("parameters", 1.0),
    ],
)
def test_load_reads_each_ema(run, ema, expected):
    for path in (run, run / "best", run / "checkpoints" / "00000004"):
        model = cm_jax.load(path, ema=ema)
        assert model.config == CONFIG
        assert value(model.params) == expected


@pytest.mark.parametrize("ema", ["0.95", "power_0.2", "ema", "exponential", "power_x", ""])
def test_an_unknown_ema_lists_those_of_the_run(run, ema):
    with pytest.raises(InputError, match=r"no such EMA. Expected one of 0.9, 0.99, power_0.1, none; got"):
        cm_jax.load(run, ema=ema)


@pytest.mark.parametrize("part", ["optimizer/moment", "ema/power_0.1"])
def test_only_the_arrays_of_the_ema_are_read(run, tmp_path, part):
    """Damage to the state of the optimizer is not noticed, damage to the EMA is."""
    conversion.write(tmp_path / "copy", "native", CONFIG, full(0.0))
    file = tmp_path / "copy" / STATE
    file.parent.mkdir()
    content = (run / "checkpoints" / "00000008" / STATE).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        place = archive.getinfo(f"{part}/stem/kernel.npy").header_offset + 300
    file.write_bytes(content[:place] + b"0123" + content[place + 4 :])
    with pytest.raises(InputError, match="damaged") if part.startswith("ema") else contextlib.nullcontext():
        assert value(cm_jax.load(tmp_path / "copy", ema="power_0.1").params) == 4.0


def test_other_checkpoints_have_no_emas(run, tmp_path):
    conversion.write(tmp_path / "native", "native", CONFIG, full(0.0))
    conversion.write(tmp_path / "one.safetensors", "native", CONFIG, full(0.0))
    for path in (tmp_path / "native", tmp_path / "one.safetensors", EMOJI):
        with pytest.raises(InputError, match="leave"):
            cm_jax.load(path, ema="0.9")


# commands


def readers():
    """The classes of options of all commands that read a checkpoint, by command."""
    for name in cli._COMMANDS:
        module = importlib.import_module(f"cm_jax.cli.{name.replace('-', '_')}")
        for kind in vars(module).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                yield name, kind


def test_every_command_that_reads_a_checkpoint_has_key_and_ema():
    """Commands read checkpoints by `WhichWeights` alone, which prints the notes; `train` by `prepare`."""
    having = {name for name, kind in readers() if issubclass(kind, WhichWeights)}
    assert having == set(cli._COMMANDS) - {"train", "download", "reconstruct-ema"}
    reading = {"load", "from_source", "conversion.read", "native.restore", "native.restore_file"}
    for path in (ROOT / "cm_jax" / "cli").glob("*.py"):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not calls & reading or path.name == "options.py", path
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {f"{name}_{choice}" for name in ("teacher", "init_from") for choice in ("key", "ema")} <= fields


LINES = {
    "sample": ("CHECKPOINT", "--labels", "nothing"),
    "edit": (
        "colorize",
        str(ROOT / "docs/images/train_edm_samples.png"),
        "--checkpoint",
        "CHECKPOINT",
        "--labels",
        "x",
    ),
    "convert": ("CHECKPOINT", "OUTPUT", "--to", "diffusers"),
    "evaluate": ("CHECKPOINT", "emoji", "--inception", "nowhere"),
    "export": ("CHECKPOINT", "OUTPUT", "--sampler", "segments"),
    "tune": ("CHECKPOINT", "nowhere.npz"),
}
"""Commands that fail after they have read the checkpoint."""


NOTE = "Weights: EMA power_0.1, of 0.9, 0.99, power_0.1, none."


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A file with two networks."""
    path = tmp_path_factory.mktemp("files") / "emoji16_cd.pt"
    tensors = torch.load(EMOJI, weights_only=True)
    torch.save({"model": tensors, "ema": tensors}, path)
    return path


def outputs(capsys, *words):
    """What a command prints until it ends."""
    with pytest.raises(SystemExit):
        cli.main(list(map(str, words)))
    return capsys.readouterr()


@pytest.mark.parametrize("name", LINES)
def test_commands_print_what_they_read(run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(export, "check_export", lambda path, platforms: list(platforms))  # which needs flatbuffers
    words = [{"CHECKPOINT": str(run), "OUTPUT": str(tmp_path / "out")}.get(word, word) for word in LINES[name]]
    assert NOTE in outputs(capsys, name, *words, "--ema", "power_0.1").out


def test_commands_read_the_key(several, capsys):
    note = "Read the network 'ema' of the file."
    assert note in outputs(capsys, "sample", several, "--key", "ema", "--labels", "nothing").out
    assert "holds 2 networks; choose one" in outputs(capsys, "sample", several).err
    assert "--ema 0.9 applies to" in outputs(capsys, "sample", several, "--ema", "0.9", "--key", "ema").err
    guided = ("sample", "emoji16_cd", "--guidance", 2, "--guidance-model", several, "--guidance-key", "ema")
    assert f"--guidance-model: {note}" in outputs(capsys, *guided).out
    assert "apply to --guidance-model" in outputs(capsys, "sample", "--guidance", 2, "--guidance-ema", "0.9").err
    assert "--ema applies to checkpoints" in outputs(capsys, "evaluate", "emoji", "emoji", "--ema", "0.9").err


def test_the_page_reads_the_ema_at_the_first_use(run, capsys, monkeypatch):
    served = []

    def page(names, load):
        served.append([value(load(name).params) for name in (*names, *names)])

    monkeypatch.setitem(sys.modules, "cm_jax.demo.page", types.SimpleNamespace(page=page, serve=lambda *_: None))
    monkeypatch.setattr(demo.threading, "active_count", lambda: 1)
    assert outputs(capsys, "demo", run, "--ema", "power_0.1").out.count(f"{run}: {NOTE}") == 1
    assert served == [[4.0, 4.0]]
    assert "--key and --ema apply to checkpoints" in outputs(capsys, "demo", "--ema", "none").err


@pytest.mark.parametrize("field", ["teacher", "init_from"])
def test_runs_start_from_the_ema(run, field):
    settings = dataclasses.replace(STUDENT, network=dataclasses.replace(NETWORK, dropout=0.0))
    if field == "init_from":
        settings = dataclasses.replace(
            settings, objective=Denoising(), target_ema=None, preconditioning=CONFIG.preconditioning
        )
    given = {field: str(run), f"{field}_ema": "power_0.1"}
    setup = prepare(dataclasses.replace(settings, **given), initial=True)
    assert value(setup.initial_state().params) == 4.0
    assert any(note.endswith(NOTE) and note.startswith("--" + field.replace("_", "-")) for note in setup.notes)
    assert any(NOTE in line for line in itertools.islice(report(setup), 8))
    with pytest.raises(InputError, match="no such EMA"):
        prepare(dataclasses.replace(settings, **given | {f"{field}_ema": "0.5"}), initial=True)
    with pytest.raises(InputError, match="apply to a checkpoint"):
        dataclasses.replace(settings, **given | {field: ""})
