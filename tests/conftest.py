"""Test environment: eight CPU devices, few compiler optimizations, run-time checks of array shapes."""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import resource
import shutil
import signal
from pathlib import Path

import jaxtyping
import pytest

from tests import typechecker

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

# PyTorch's threads wait for each other by spinning, which takes a hundred times the time where cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"

# Compilation takes most of the test time. Worker processes and subprocesses inherit these settings.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Flags of jaxlib 0.10 that reduce the compilation time by another 60 %. Version 0.12 aborts at the first of them.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
USUAL = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
QUICK_CODE = importlib.metadata.version("jaxlib").startswith("0.10.")
if QUICK_CODE and QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# Programs stay in the checkout, so that the next run of the tests compiles only what has changed.
COMPILED = Path(__file__).parents[1] / ".cache" / "compiled"
COMPILED_LIMIT = 2e9
"""Bytes of compiled programs above which the next run begins without them."""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    if sum(path.stat().st_size for path in COMPILED.glob("*")) > COMPILED_LIMIT:
        shutil.rmtree(COMPILED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A shell without job control starts `make test &` with Ctrl-C ignored, which tests send to processes of their own.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

typechecker.install()


@pytest.fixture(params=["C++ kernels", "XLA"])
def each_implementation(request):
    """The C++ kernels, then the operations of XLA, which all other devices use."""
    from cm_jax import kernels

    with kernels.off() if request.param == "XLA" else contextlib.nullcontext():
        yield


@pytest.fixture
def optimized(monkeypatch):
    """Compile with all optimizations, as users do: for networks whose outputs are recorded. It takes twice the time."""
    import jax
    from jax._src import compiler

    options = compiler.get_compile_options

    def usual(*arguments, env_options_overrides=None, **settings):
        return options(*arguments, env_options_overrides=USUAL | (env_options_overrides or {}), **settings)

    if QUICK_CODE:
        monkeypatch.setattr(compiler, "get_compile_options", usual)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def unchecked_types():
    """Arguments of any type reach the code, as for users, who have no run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def _returned_memory():
    """Commands called by tests leave memory allocation alone: what they keep is kept until the worker ends."""
    from cm_jax import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "keep_memory", lambda: False)
        yield


@pytest.fixture
def copying(tmp_path_factory):
    """A compiler that copies the library of this process, because compiling it takes ten seconds, and its log."""
    from cm_jax import kernels

    folder = tmp_path_factory.mktemp("compiler")
    script, log = folder / "c++", folder / "log"
    library = kernels.building._library()._name
    script.write_text(f'''#!/bin/sh
for last; do :; done
case "$*" in
    *-shared*) sleep "${{LINK_SECONDS:-0}}"; cp "{library}" "$last"; echo linked >> "{log}";;
    *) : > "$last";;
esac
''')
    script.chmod(0o755)
    log.touch()
    return str(script), log


RESIDENT_LIMIT = 1.2e9
"""Bytes of memory above which a worker drops its compiled programs after a file of tests."""


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Keep only as many compiled programs as fit: without this, a worker grows to several GB."""
    yield
    if resident_bytes() > RESIDENT_LIMIT:
        import jax

        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # only glibc returns freed memory on request
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where it cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def pytest_collection_finish():
    """The modules are here to stay, and tracing makes much short-lived garbage: default collections cost 15 %."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


LONG = (
    "test_killed_and_together",
    "test_former_format",
    "test_browser",
    "test_training",
    "test_training_setup",
    "test_gaussian_training",
    "test_hostile",
)


def pytest_collection_modifyitems(items):
    """Start the longest files first, to balance the workers."""
    items.sort(key=lambda item: item.path.stem not in LONG)
