"""Hostile input: a few cases of `python -m tools.fuzz`, and one case for each fault that it found."""

import contextlib
import dataclasses
import io
import json
import pickle
import random
import re
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cm_jax import cli
from cm_jax.checkpoints import native
from cm_jax.conversion import read
from cm_jax.conversion.torch_files import LEGACY
from cm_jax.data import NpzData
from cm_jax.errors import DamagedError, InputError
from cm_jax.evaluation.features import read_statistics
from cm_jax.training.run import state_io
from cm_jax.training.run.history import read_config
from tests.runs.test_commands import failed
from tests.support import EMOJI, run
from tools.fuzz import commands, payloads, seeds
from tools.fuzz.runner import fuzz, observe, temporary_workspace
from tools.fuzz.targets import HINTS, TARGETS

SLOW = ("native folder", "run", "run, tables", "run, JSON", "jcm", "TorchScript")


@pytest.fixture(scope="module")
def place():
    with temporary_workspace() as made:
        yield made


@pytest.fixture
def good(place):
    return place.valid


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(place, name):
    faults: list[str] = []
    counts = fuzz(place, [name], seed=0, numbers=range(2 if name in SLOW else 15), report=faults.append)[name]
    assert not faults
    assert not counts["fault"]


@pytest.mark.parametrize("name", TARGETS)
def test_the_undamaged_file_is_read(place, name, tmp_path):
    """Otherwise its damage would prove nothing."""
    target = TARGETS[name]
    copy = shutil.copytree if (place.valid / target.file).is_dir() else shutil.copyfile
    target.read(Path(copy(place.valid / target.file, tmp_path / target.file)), random.Random(1))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(command=st.sampled_from([*commands.LINES]), rng=st.randoms(use_true_random=False))
def test_command_lines_run_or_are_refused(place, command, rng):
    found, words = place.run_command_line(commands.line(command, rng))
    assert found.outcome != "fault", f"{words}\n{found.reason}"


def test_the_files_of_a_fault_are_kept(place, monkeypatch, tmp_path):
    name, faults = "native folder", []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(TARGETS, name, dataclasses.replace(TARGETS[name], read=lambda path, rng: failing(KeyError())))
    fuzz(place, [name], seed=0, numbers=range(1), report=faults.append)
    (kept,) = tmp_path.iterdir()
    assert f"Its files: {kept}\n" in faults[0]
    damaged, found = ({each.relative_to(top): each.read_bytes() for each in top.rglob("*") if each.is_file()}
                      for top in (place.work, kept))  # fmt: skip
    assert damaged == found


def test_every_command_has_lines():
    assert set(commands.LINES) == {"", *cli._COMMANDS}


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda: pickle.loads(payloads.pickles()[0]), "code in the file was executed"),
        (lambda: {}["x"], "KeyError"),
        (lambda: Path("left").touch(), "on the disk this was written, changed or removed: left"),
        (lambda: Path("there").write_text("more"), "changed or removed: there"),
        (lambda: print("Traceback (most recent call last):"), "a traceback was printed"),
        (lambda: failing(InputError("")), "a message of 0 characters"),
        (lambda: cli.main(["sample", "--seed", "\x1b[2J"]), ""),
        (lambda: failing(SystemExit(1)), "exit status 1"),
    ],
)
def test_each_kind_of_fault_is_detected(tmp_path, use, why):
    (tmp_path / "there").write_text("")
    with contextlib.chdir(tmp_path):
        found = observe(use, tmp_path, lambda name, outcome: False)
    assert (found.outcome == "fault") == bool(why)
    assert why in found.reason


def failing(error):
    raise error


def array_file(descr="'|u1'", shape="(2,)", content=b"\0\0"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def npz(path, content, patch=None):
    """An .npz file whose entries all have this content; `patch`: (offset, byte) in the directory record of each."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("images", "class_names", "mu", "sigma"):
            archive.writestr(f"{name}.npy", content)
    written = bytearray(stream.getvalue())
    start = -1
    while patch and (start := written.find(b"PK\x01\x02", start + 1)) >= 0:
        written[start + patch[0]] = patch[1]
    path.write_bytes(written)
    return path


@pytest.mark.parametrize(
    ("content", "patch", "message"),
    [
        (array_file(shape="(((("), None, "damaged|Cannot parse"),
        (b"no array", None, "is not an array"),
        (array_file("'<U1'", "(1,)", b"\xff\xff\xff\x7f"), None, "is damaged"),
        (array_file("'|O'", "(1,)", pickle.dumps(payloads._Calls(print))), None, "Object arrays cannot be loaded"),
        (array_file("'<f4'", f"({2**50},)"), None, "damaged|allocate"),
        (array_file(), (10, 77), "compression method"),
        (array_file(), (8, 1), "encrypted"),
        (array_file(), (8, 32), "compressed patched data"),
        (array_file(), (6, 219), "zip file version"),
    ],
    ids=["header", "bytes", "letters", "objects", "petabytes", "method", "password", "patched", "version"],
)
def test_damaged_npz_files_are_refused(tmp_path, content, patch, message):
    path = npz(tmp_path / "x.npz", content, patch)
    with pytest.raises(InputError, match=message):
        NpzData(str(path)).open(8)
    with pytest.raises(InputError, match=message):
        read_statistics(path)


@pytest.mark.parametrize(
    ("patch", "message"),
    [((8, 32), "compressed patched data"), ((8, 1), "encrypted"), ((10, 77), "compression method")],
)
def test_damaged_storages_are_refused(good, tmp_path, patch, message):
    written = bytearray((good / "openai.pt").read_bytes())
    entry = written.rfind(b"PK\x01\x02", 0, written.rfind(b"/data/"))
    written[entry + patch[0]] = patch[1]
    (tmp_path / "model.pt").write_bytes(written)
    with pytest.raises(InputError, match=f"is damaged: .*{message}"):
        read(tmp_path / "model.pt", HINTS)


def test_zip_bombs_are_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(payloads.bomb("archive", 2**25))
    with pytest.raises(InputError, match="unpacks to 134,2"):
        read(tmp_path / "model.pt")


def test_unreadable_files_are_refused(capsys):
    assert "cannot be read: Input/output error" in failed(capsys, cli.main_sample, "/proc/self/mem")


def test_the_error_of_a_damaged_checkpoint_is_one_line(good, tmp_path):
    """Threads of the Orbax store continue after the first failure, and must not print tracebacks."""
    shutil.copytree(good / "native", tmp_path / "native")
    for file in (tmp_path / "native" / "params").glob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])
    done = run("sample.py", str(tmp_path / "native"), "--output", str(tmp_path / "s.png"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: The parameters in ")
    assert done.stderr.count("\n") == 1


def test_a_flipped_bit_in_a_native_checkpoint_is_detected_or_has_no_effect(tmp_path):
    """The Orbax store itself has no checksums of array data. Some bits of its files have no effect on any array."""
    source, rng = read(EMOJI), random.Random(0)
    native.save(tmp_path / "native", source.config, source.params)
    largest = max((tmp_path / "native" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    noticed = []
    for _ in range(3):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        largest.write_bytes(damaged)
        try:
            _, params = native.restore(tmp_path / "native")
        except InputError as error:
            noticed.append(str(error))
        else:
            jax.tree.map(np.testing.assert_array_equal, params, source.params)
    assert noticed
    assert all(re.search(r"damaged or incomplete \(the checksum of .* is not that", message) for message in noticed)
    largest.write_bytes(content)
    assert native.restore(tmp_path / "native")[0] == source.config


def test_messages_do_not_contain_whole_files(tmp_path):
    array = msgpack.packb(((100_000,), "float32", bytes(400_000))) + b"more"
    (tmp_path / "jcm").write_bytes(msgpack.packb({"params_ema": {"a": msgpack.ExtType(1, array)}}))
    with pytest.raises(InputError, match="not a complete Flax checkpoint") as refused:
        read(tmp_path / "jcm")
    assert len(str(refused.value)) < 1000


def test_keys_of_another_shape_are_refused(good, tmp_path):
    content = (good / "run" / "checkpoints" / "00000005" / "state" / "state.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as there, zipfile.ZipFile(tmp_path / "state.npz", "w") as here:
        for name in there.namelist():
            here.writestr(name, there.read("params/kernel.npy" if name == "key.npy" else name))
    with pytest.raises(DamagedError, match="key has another shape"):
        state_io.read(tmp_path / "state.npz", seeds.STATE)


def test_code_in_a_storage_of_an_edm_pickle_is_refused(tmp_path, good, monkeypatch):
    """A storage is a pickle within the pickle; code in it creates CANARY if it runs."""
    monkeypatch.chdir(tmp_path)
    content, payload = (good / "edm.pkl").read_bytes(), pickle.dumps(payloads._Calls(exec, "open('CANARY', 'w')"), 2)
    place = content.index(LEGACY)
    Path("edm.pkl").write_bytes(content[:place] + payload + content[place + len(payload) :])
    with pytest.raises(InputError, match="edm"):
        read(Path("edm.pkl"))
    assert not Path("CANARY").exists()


def test_a_run_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="is not the config of a run"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


LONG = "x" * 300


@pytest.mark.parametrize(
    "line",
    [
        f"train emoji32-cd --dry-run --teacher {LONG}",
        f"train emoji32-edm --dry-run --data ImageFolder --data.path {LONG}",
        f"train emoji32-edm --dry-run --data NpzData --data.path {LONG}",
        f"train emoji32-edm --dry-run --data TFDSData --data.name x --data.data-dir {LONG}",
        f"evaluate {LONG} emoji",
        f"evaluate emoji {LONG} --metrics bpd",
        f"tune {LONG} emoji",
        f"convert emoji16_cd {LONG}",
        f"convert {LONG} x.safetensors --to lpips",
        f"convert {LONG} x.safetensors --to inception",
        f"sample --output {LONG}.png",
        f"edit stroke {LONG}",
        "evaluate ~nobody/x emoji",
        "train emoji32-edm --dry-run --data ImageFolder --data.path ~nobody/x",
    ],
)
def test_names_that_cannot_be_paths(capsys, tmp_path, line):
    with contextlib.chdir(tmp_path):
        failed(capsys, cli.main, *line.split())
    assert not list(tmp_path.iterdir())


def test_a_link_to_itself_as_destination(capsys, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for line in ("convert emoji16_cd loop", "sample --output loop"):
        with contextlib.chdir(tmp_path):
            assert "Too many levels" in failed(capsys, cli.main, *line.split())


def test_control_characters_of_files_are_escaped(good, tmp_path, capsys):
    shutil.copytree(good / "native", tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps({**config, "\x1b[2J": 1}))
    said = failed(capsys, cli.main_sample, tmp_path / "native")
    assert "\x1b" not in said
    assert r"\x1b[2J" in said


def test_messages_do_not_contain_whole_command_lines(capsys):
    assert len(failed(capsys, cli.main_sample, "--batch-size", "1" + ",1" * 20_000)) < 3000


@pytest.mark.parametrize("content", payloads.pickles()[:12], ids=range(12))
def test_malicious_pickles_are_refused(good, tmp_path, content):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with contextlib.chdir(tmp_path), pytest.raises(InputError):
        read(tmp_path / "model.pt")
    assert not (tmp_path / payloads.CANARY).exists()
