"""Compiles the C++ sources for this machine's processor into the user's cache folder and registers them with XLA."""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
from jaxtyping import Array

from cm_jax.io.atomic import user_cache
from cm_jax.progress import activity

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.cc", "convolution.cc", "norm.cc", "product.cc"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "products.h"))
TARGETS = (
    "cm_jax_attention",
    "cm_jax_attention_gradient",
    "cm_jax_convolve",
    "cm_jax_kernel_gradient",
    "cm_jax_norm",
    "cm_jax_norm_gradient",
    "cm_jax_product_gradient",
)
"""Functions that XLA calls."""

_FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fPIC")
_TIMEOUT = 300
"""Seconds allowed per compiler call; usually one to three."""
_one_thread = threading.Lock()
_switched_off = jax.make_user_context(False)
_temporary: list[tempfile.TemporaryDirectory[str]] = []
_log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether the kernels can be used. The first call on a machine compiles them, which takes seconds.

    False without a C++ compiler ($CXX, c++, g++ or clang++), if compilation fails, on Windows, and with
    CM_JAX_KERNELS=off.
    """
    with _one_thread:
        return _registered()


@functools.cache
def _registered() -> bool:
    """`available`, called by one thread at a time."""
    if os.environ.get("CM_JAX_KERNELS", "").lower() in ("off", "0") or sys.platform == "win32":
        return False
    try:
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(_library(), target)), platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("The CPU kernels could not be compiled; using XLA, which is slower. %s", str(reason)[-500:])
        return False
    return True


@functools.cache
def lanes() -> int:
    """Vector width: numbers of channels must be multiples of it."""
    return int(_library().cm_jax_lanes())


def off() -> contextlib.AbstractContextManager[None]:
    """A context manager that turns off the kernels and cuDNN's attention: XLA's operations are traced instead."""
    return _switched_off(True)


def switched_off() -> bool:
    """Whether the code runs inside `off()`."""
    return bool(_switched_off.value)


def suits(x: Array, channels: int | None = None) -> bool:
    """Whether the kernels suit x: on a CPU, with channels in multiples of `lanes()`, in float32 or less.

    The caller casts half precision to float32, as XLA does on CPUs. Meshes with explicit axes need XLA's operations:
    the kernels have no rules for the shardings of their results.

    channels: number of output channels if it differs from that of x.
    """
    return (
        x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        and not switched_off()
        and jax.default_backend() == "cpu"
        and available()
        and x.shape[-1] % lanes() == 0
        and (channels is None or channels % lanes() == 0)
        and not jax.typeof(x).sharding.mesh.explicit_axes
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled library. Raises OSError without a compiler, SubprocessError if compilation fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("There is no C++ compiler (c++, g++ or clang++).")
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    identity = (*sources, jaxlib.version.__version__, compiler, *_FLAGS, _processor())
    name = f"kernels-{_digest(repr(identity).encode())[:20]}.so"
    path = _folder(name) / name
    if not _intact(path):
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _folder(name: str) -> Path:
    """A folder in the user's cache, or a temporary one if that is not writable and lacks the library `name`."""
    try:
        folder = user_cache("kernels")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or _intact(folder / name):
            return folder
    except (OSError, RuntimeError):
        pass
    _temporary.append(tempfile.TemporaryDirectory(prefix="cm_jax_kernels_", ignore_cleanup_errors=True))
    return Path(_temporary[-1].name)


def _compile(compiler: str, path: Path) -> None:
    """Compile into a temporary folder, then rename, so that concurrent processes never load a partial library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as workspace:

        def run(*arguments: str) -> None:
            command = [*compiler.split(), *_FLAGS, *arguments]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)

        objects = {source: str(Path(workspace) / f"{source.stem}.o") for source in SOURCES}
        headers = ("-isystem", jax.ffi.include_dir())
        expected = f"with {compiler}, once on this machine, usually 5 to 60 s"
        with activity("Compiling the CPU kernels", expected, total=len(SOURCES), unit="files") as shown:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                jobs = [pool.submit(run, "-c", *headers, str(source), "-o", objects[source]) for source in SOURCES]
                for job in concurrent.futures.as_completed(jobs):
                    job.result()
                    shown.advance()
            library = Path(workspace) / path.name
            run("-shared", *objects.values(), "-o", str(library))
        path.with_suffix(".sha256").write_bytes(_digest(library.read_bytes()).encode())
        library.replace(path)


def _intact(path: Path) -> bool:
    """Whether the library exists and matches its checksum: a damaged one would crash the process."""
    checksum = path.with_suffix(".sha256")
    return checksum.exists() and path.exists() and checksum.read_bytes() == _digest(path.read_bytes()).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _processor() -> str:
    """Processor model and features, so that machines with different processors can share a cache folder."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() + platform.machine()
    first = cpuinfo.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.split("\t")[0] in ("model name", "flags", "Features", "CPU part"))
