"""The C++ sources compiled for this machine's processor, kept in the user's cache folder, and known to XLA."""

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
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
from jaxtyping import Array

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
"""The functions that XLA calls."""

_FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fPIC")
_PATIENCE = 300
"""Seconds that a compiler may take; it needs one to three for each source."""
_switched_off = jax.make_user_context(False)
_temporary: list[tempfile.TemporaryDirectory[str]] = []
_log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether the functions can be called: the first call compiles them (seconds) where that was not done before.

    False without a C++ compiler ($CXX, c++, g++ or clang++), where it fails, and with CM_JAX_KERNELS=off.
    """
    if os.environ.get("CM_JAX_KERNELS", "").lower() in ("off", "0") or sys.platform == "win32":
        return False
    try:
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(_library(), target)), platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("Convolutions are XLA's, which are slower: ours could not be compiled. %s", str(reason)[-500:])
        return False
    return True


@functools.cache
def lanes() -> int:
    """What numbers of channels must be multiples of."""
    return int(_library().cm_jax_lanes())


def off() -> contextlib.AbstractContextManager[None]:
    """A context in which XLA's forms are taken: what is called there is traced and compiled apart."""
    return _switched_off(True)


def suits(x: Array, channels: int | None = None) -> bool:
    """Whether the functions take such images, and are to be preferred: float32 on a CPU, in whole vectors of channels.

    channels: of the output, where it has others.
    """
    return (
        x.dtype == jnp.float32
        and x.size > 0
        and not _switched_off.value
        and jax.default_backend() == "cpu"
        and available()
        and x.shape[-1] % lanes() == 0
        and (channels is None or channels % lanes() == 0)
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled library. Raises OSError where there is no compiler, SubprocessError where it fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("There is no C++ compiler (c++, g++ or clang++).")
    identity = (
        *[path.read_text() for path in (*SOURCES, *HEADERS)],
        jaxlib.version.__version__,
        compiler,
        *_FLAGS,
        _processor(),
    )
    name = f"kernels-{_digest(repr(identity).encode())[:20]}.so"
    place = _folder() / name
    if not _whole(place):
        _compile(compiler, place)
    return ctypes.CDLL(str(place))


def _folder() -> Path:
    """In the user's cache; where that cannot be written to, a new one, until the process ends."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm_jax" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    _temporary.append(tempfile.TemporaryDirectory(prefix="cm_jax_native_", ignore_cleanup_errors=True))
    return Path(_temporary[-1].name)


def _compile(compiler: str, place: Path) -> None:
    """Beside its place, then renamed: processes that begin together do not see each other's halves."""
    with tempfile.TemporaryDirectory(dir=place.parent) as beside:

        def run(*words: str) -> None:
            command = [*compiler.split(), *_FLAGS, *words]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)

        objects = {source: str(Path(beside) / f"{source.stem}.o") for source in SOURCES}
        headers = ("-isystem", jax.ffi.include_dir())
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda source: run("-c", *headers, str(source), "-o", objects[source]), SOURCES))
        made = Path(beside) / place.name
        run("-shared", *objects.values(), "-o", str(made))
        _checksum(place).write_text(_digest(made.read_bytes()))
        made.replace(place)


def _whole(place: Path) -> bool:
    """Whether the library is there as it was made: a process that calls a damaged one is ended by the system."""
    return _checksum(place).exists() and place.exists() and _checksum(place).read_text() == _digest(place.read_bytes())


def _checksum(place: Path) -> Path:
    return place.with_suffix(".sha256")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _processor() -> str:
    """What tells processors apart for which a compiler makes different programs: a cache may be shared by machines."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return platform.processor() + platform.machine()
    first = described.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.split("\t")[0] in ("model name", "flags", "Features", "CPU part"))
