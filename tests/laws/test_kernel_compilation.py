"""The C++ CPU kernels are compiled once, for every processor, and can be switched off; memory is kept between steps."""

import os
import platform
import subprocess
import sys

import pytest

from cm_jax import kernels
from cm_jax.kernels import building
from tests.support import ROOT

pytestmark = pytest.mark.skipif(not kernels.available(), reason="No C++ compiler.")


SCRIPT = """
import logging, sys
logging.basicConfig()
from cm_jax import kernels
print(kernels.available())
"""


def availability(tmp_path, **environment):
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=own, capture_output=True, text=True, check=True)


def test_compilation_failure_gives_one_warning_and_no_kernels(tmp_path):
    latin = tmp_path / "c++"
    latin.write_bytes(b"#!/bin/sh\necho 'Erreur: op\xe9rande' >&2; exit 1\n")
    latin.chmod(0o755)
    for compiler, word in (("/no/such/compiler", "No such file"), ("false", "exit status 1"), (str(latin), "Erreur")):
        done = availability(tmp_path, CXX=compiler)
        assert done.stdout == "False\n"
        assert done.stderr.count("could not be compiled") == 1
        assert word in done.stderr
    assert not list(tmp_path.rglob("*.so"))


GRADIENTS = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.laws import test_kernels
for case in test_kernels.ONE_PER_KERNEL:
    test_kernels.test_gradients(case)
print(test_kernels.building.lanes())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 compiler flags")
@pytest.mark.parametrize(("flag", "lanes"), [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_processors_with_narrower_vectors(tmp_path, flag, lanes):
    quick = tmp_path / "c++"
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O1\n')
    quick.chmod(0o755)
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": f"{quick} {flag}"}
    done = subprocess.run([sys.executable, "-c", GRADIENTS, str(ROOT)], env=own, capture_output=True, text=True)
    assert done.stdout == f"{lanes}\n", done.stderr


KEEPING = """
import ctypes, sys, time
import jax, jax.numpy as jnp
from cm_jax import kernels

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Info
kept = sys.argv[1] == "kept" and kernels.keep_memory()
step = jax.jit(lambda x: jnp.sin(x) + 1)
x = jax.block_until_ready(step(jnp.ones(2**23)))
full = heap().hblkhd
del x
while not kept and heap().hblkhd >= full:  # a thread of the device may still hold the result
    time.sleep(0.01)
before = heap()
x = jax.block_until_ready(step(jnp.ones(2**23)))
during = heap()
del x
print(int(kept), during.hblkhd - before.hblkhd, heap().arena - before.arena)
"""
"""Prints the bytes that the result of a step takes from the system, and by how much the heap has grown afterwards."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory needs glibc")
def test_keep_memory_takes_no_memory_from_the_system_in_every_step():
    found = {}
    for mode in ("kept", "returned"):
        own = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", KEEPING, mode], env=own, capture_output=True, text=True, check=True
        )
        kept, *found[mode] = map(int, done.stdout.split())
        assert kept == (mode == "kept")
    assert found["kept"] == [0, 0]
    assert found["returned"][0] >= 4 * 2**23


def test_kernels_can_be_switched_off(tmp_path):
    done = availability(tmp_path, CM_JAX_KERNELS="off")
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert not list(tmp_path.rglob("*"))


def test_kernels_work_without_a_writable_cache(tmp_path, copying):
    (tmp_path / "file").touch()
    assert availability(tmp_path / "file", TMPDIR=str(tmp_path), CXX=copying[0]).stdout == "True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_library_is_compiled_once_and_recompiled_if_damaged(tmp_path, copying):
    compiler, log = copying
    assert availability(tmp_path, CXX=compiler).stdout == "True\n"
    (made,) = tmp_path.rglob("*.so")
    assert availability(tmp_path, CXX="c++ -fno-such-flag").stdout == "False\n"
    assert availability(tmp_path, CXX=compiler).stdout == "True\n"
    assert log.read_text() == "linked\n"
    made.write_bytes(made.read_bytes()[:1000])
    assert availability(tmp_path, CXX=compiler).stdout == "True\n"
    assert log.read_text() == "linked\n" * 2
    assert len(made.read_bytes()) > 1000
    made.with_suffix(".sha256").write_bytes(b"\xff" * 64)
    assert availability(tmp_path, CXX=compiler).stdout == "True\n"
    assert log.read_text() == "linked\n" * 3


def test_a_compiled_library_in_a_read_only_cache_is_used(tmp_path, copying, monkeypatch):
    compiler, log = copying
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    made = building._library.__wrapped__()._name
    monkeypatch.setattr(building.os, "access", lambda *_: False)
    assert building._library.__wrapped__()._name == made
    assert log.read_text() == "linked\n"


THREADS = """
import concurrent.futures
from cm_jax import kernels
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(*[job.result() for job in [pool.submit(kernels.available) for _ in range(4)]])
"""


def test_threads_compile_the_library_once(tmp_path, copying):
    compiler, log = copying
    own = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "CXX": compiler, "LINK_SECONDS": "1"}
    done = subprocess.run([sys.executable, "-c", THREADS], env={**os.environ, **own}, capture_output=True, text=True)
    assert done.stdout == "True True True True\n", done.stderr
    assert log.read_text() == "linked\n"
