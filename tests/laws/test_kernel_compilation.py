"""The C++ CPU kernels are compiled once, for every processor, and can be switched off; memory is kept between steps."""

import os
import platform
import subprocess
import sys

import pytest

from cm_jax import kernels
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
    for compiler, word in (("/no/such/compiler", "No such file"), ("false", "exit status 1")):
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
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": f"c++ {flag}"}
    done = subprocess.run([sys.executable, "-c", GRADIENTS, str(ROOT)], env=own, capture_output=True, text=True)
    assert done.stdout == f"{lanes}\n", done.stderr


PAGE_FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from cm_jax import kernels
kept = sys.argv[1] == "kept" and kernels.keep_memory()
step = jax.jit(lambda x: jnp.cumsum(jnp.sin(x)) + 1)
x = jnp.ones(2**24)
for _ in range(3):
    jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    jax.block_until_ready(step(x))
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory needs glibc")
def test_keep_memory_avoids_page_faults_in_every_step():
    counts = {}
    for mode in ("kept", "returned"):
        own = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", PAGE_FAULTS, mode], env=own, capture_output=True, text=True, check=True
        )
        kept, counts[mode] = map(int, done.stdout.split())
        assert kept == (mode == "kept")
    assert counts["kept"] < counts["returned"] / 10


def test_kernels_can_be_switched_off(tmp_path):
    done = availability(tmp_path, CM_JAX_KERNELS="off")
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert not list(tmp_path.rglob("*"))


def test_kernels_work_without_a_writable_cache(tmp_path):
    (tmp_path / "file").touch()
    assert availability(tmp_path / "file", TMPDIR=str(tmp_path)).stdout == "True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_library_is_compiled_once_and_recompiled_if_damaged(tmp_path):
    assert availability(tmp_path).stdout == "True\n"
    (made,) = tmp_path.rglob("*.so")
    assert availability(tmp_path, CXX="c++ -fno-such-flag").stdout == "False\n"
    written = made.stat().st_mtime_ns
    assert availability(tmp_path).stdout == "True\n"
    assert made.stat().st_mtime_ns == written
    made.write_bytes(made.read_bytes()[:1000])
    assert availability(tmp_path).stdout == "True\n"
    assert len(made.read_bytes()) > 1000
