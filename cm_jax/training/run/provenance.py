"""RUN/run.json: command, versions, commit, devices and environment of every start of a run."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import cm_jax
from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write
from cm_jax.io.validation import read_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets")
_ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
"""Variables that affect the computation."""


def record_start(
    run: Path,
    batches: int,
    command: Sequence[str] | None = None,
    data: str | None = None,
    teacher: str | None = None,
) -> None:
    """Append a start after `batches` to RUN/run.json (in process 0 only).

    command: the program and its arguments. Default: those of this process. data: content hash of the images. teacher:
    digest of the teacher's parameters. Raises InputError if the file is damaged or cannot be written.
    """
    if jax.process_index() != 0:
        return
    file, starts = run / "run.json", _starts(run / "run.json")
    kinds = [device.device_kind for device in jax.devices()]
    versions = {"python": platform.python_version(), "cm_jax": cm_jax.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    start = {
        "batches": batches,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": data,
        **({"teacher": teacher} if teacher else {}),
        "command": shlex.join(command or sys.argv),
        "versions": versions,
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "processes": jax.process_count(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
    with atomic_write(file) as fresh:
        fresh.write_text(json.dumps({"starts": [*starts, start]}, indent=2) + "\n", "utf-8")


def last_content(run: Path) -> tuple[str | None, str | None]:
    """Content hash of the images and digest of the teacher at the last start; None for what is not known."""
    starts = _starts(run / "run.json")
    last = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    data, teacher = (
        found if isinstance(found := last.get(name), str) and found else None for name in ("data", "teacher")
    )
    return data, teacher


def _starts(file: Path) -> list[Any]:
    starts = read_json(file).get("starts") if file.exists() else []
    if not isinstance(starts, list):
        raise InputError(f"{file} has no list of starts: move it away, and a new one is written.")
    return starts


def _commit() -> str | None:
    """Commit of the checkout, with a note if files differ from it; None for an installed package."""
    root = Path(cm_jax.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    options = ("--always", "--exclude=*", "--abbrev=40", "--dirty=, with uncommitted changes")
    command = ["git", "-C", str(root), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
