"""The lock of a run's folder: only one process trains in it."""

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from cm_jax.errors import InputError

_log = logging.getLogger(__name__)


def lock(run: Path) -> int:
    """Create a run's folder, and lock it until the returned file descriptor is closed or the process ends.

    Raises InputError if another process holds the lock.
    """
    file = run / ".lock"
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"Cannot train in {run}: {error.strerror or error}. Give another folder.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 500).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise InputError(
            f"Another process ({holder}) trains in {run}: wait for it, stop it, or give another folder."
        ) from error
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s cannot be locked (%s): make sure that only one process trains in it.", run, error.strerror)
    if not file.exists() or not os.path.samestat(os.fstat(handle), file.stat()):  # removed by a start that failed
        os.close(handle)
        return lock(run)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    os.ftruncate(handle, 0)
    os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    return handle
