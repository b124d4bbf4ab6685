"""RUN/.lock: at most one process trains in a folder. The lock ends with the process that holds it."""

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from cm_jax.errors import InputError

_log = logging.getLogger(__name__)


def lock(folder: Path) -> int:
    """Lock a folder; closing the returned file descriptor unlocks it. Raises InputError if another process holds it."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"Cannot train in {folder}: {error.strerror or error}. Give another folder.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 500).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise InputError(
            f"Another process ({holder}) trains in {folder}: wait for it, stop it, or give another folder."
        ) from error
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s cannot be locked (%s): make sure that only one process trains in it.", folder, error.strerror)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    os.ftruncate(handle, 0)
    os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    return handle
