"""Writing so that a failure leaves nothing half-done: beside the destination first, then renamed onto it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cm_jax.errors import InputError


@contextlib.contextmanager
def written_beside(destination: Path) -> Iterator[Path]:
    """A fresh path in the destination's folder; renamed to `destination` if the block ends well, removed if not.

    The block may write a file there or make a folder. An existing file is replaced; an existing folder is only if it is
    empty. Raises InputError where the destination cannot be written.
    """
    check_writable(destination)
    workspace = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield workspace / destination.name
        if destination.is_dir() and (workspace / destination.name).is_dir():
            destination.rmdir()
        os.replace(workspace / destination.name, destination)
    except OSError as error:
        raise InputError(f"Cannot write {destination}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def check_writable(destination: Path) -> None:
    """Make the destination's folder where it is missing. Raises InputError if `destination` could not be written."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.is_dir() and any(destination.iterdir()):
            raise InputError(
                f"{destination} is a folder with files in it, which are not overwritten: name another or remove it."
            )
        with tempfile.TemporaryDirectory(prefix=".writable.", dir=destination.parent):
            pass
    except OSError as error:
        raise InputError(
            f"Cannot write {destination}: {error.strerror or error}. Name one in a folder that you may write to."
        ) from error
