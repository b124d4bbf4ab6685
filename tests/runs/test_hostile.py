"""Hostile input: a small share of what `python -m tools.fuzz` tries, and one case for every fault that it found."""

import io
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cm_jax import cli
from cm_jax.conversion import read
from cm_jax.data import NpzData
from cm_jax.errors import InputError
from cm_jax.evaluation.references import read_statistics
from tests.runs.test_commands import failed
from tests.support import run
from tools.fuzz import commands, payloads, readers
from tools.fuzz.fuzzing import run as fuzz
from tools.fuzz.fuzzing import workplace
from tools.fuzz.watching import inside, watched

SLOW = ("native checkpoint", "run, any", "run, metrics", "run, JSON", "jcm", "Inception")


@pytest.fixture(scope="module")
def place():
    with workplace() as made:
        yield made


@pytest.fixture
def good(place):
    return place.good


@pytest.mark.parametrize("name", [target.name for target in readers.READERS])
def test_damaged_files_are_read_or_refused(place, name):
    faults: list[str] = []
    tally = fuzz(place, [name], seed=0, each=2 if name.startswith(SLOW) else 15, report=faults.append)[name]
    assert not faults
    assert not tally.outcomes["fault"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(command=st.sampled_from(commands.COMMANDS), rng=st.randoms(use_true_random=False))
def test_command_lines_run_or_are_refused(place, command, rng):
    found, words = place.run_line(command.line(rng))
    assert found.outcome != "fault", f"{words}\n{found.why}"


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
def test_what_a_fault_is(tmp_path, use, why):
    """The watcher sees each kind of fault: without it, none found would mean nothing."""
    (tmp_path / "there").write_text("")
    with inside(tmp_path):
        found = watched(use, tmp_path, lambda name, outcome: False)
    assert (found.outcome == "fault") == bool(why)
    assert why in found.why


def failing(error):
    raise error


def array_file(descr="'|u1'", shape="(2,)", content=b"\0\0"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def npz(path, content, patch=None):
    """An .npz file with this content of images, its statistics and its names; `patch`: (place, byte) in each entry's
    description."""
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
        (b"no array", None, "is no array"),
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
def test_npz_files_of_every_damage_are_refused(tmp_path, content, patch, message):
    path = npz(tmp_path / "x.npz", content, patch)
    with pytest.raises(InputError, match=message):
        NpzData(str(path)).open(8)
    with pytest.raises(InputError, match=message):
        read_statistics(path)


@pytest.mark.parametrize(
    ("patch", "message"),
    [((8, 32), "compressed patched data"), ((8, 1), "encrypted"), ((10, 77), "compression method")],
)
def test_storages_that_cannot_be_unpacked_are_refused(good, tmp_path, patch, message):
    written = bytearray((good / "openai.pt").read_bytes())
    entry = written.rfind(b"PK\x01\x02", 0, written.rfind(b"/data/"))
    written[entry + patch[0]] = patch[1]
    (tmp_path / "model.pt").write_bytes(written)
    with pytest.raises(InputError, match=f"is damaged: .*{message}"):
        read(tmp_path / "model.pt", readers.HINTS)


def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path):
    (tmp_path / "model.pt").write_bytes(payloads.bomb("archive", 2**25))
    with pytest.raises(InputError, match="says that it unpacks to 134,2"):
        read(tmp_path / "model.pt")


def test_a_file_that_cannot_be_read_is_refused(capsys):
    assert "cannot be read: Input/output error" in failed(capsys, cli.main_sample, "/proc/self/mem")


def test_a_damaged_checkpoint_is_one_line(good, tmp_path):
    """Threads of Orbax's store go on after the first failure, and used to print a traceback each."""
    shutil.copytree(good / "native", tmp_path / "native")
    for file in (tmp_path / "native" / "params").glob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])
    done = run("sample.py", str(tmp_path / "native"), "--output", str(tmp_path / "s.png"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: The parameters in ")
    assert done.stderr.count("\n") == 1


def test_a_flipped_bit_in_our_checkpoint_is_noticed_or_changes_no_weight(tmp_path):
    """Orbax's store has checksums of its tables alone, and gave 80 of 80 such weights out.

    Where its files lie depends on its threads, and now and then a bit is one that no weight depends on.
    """
