"""Writing so that a failure leaves nothing half-done: beside the destination first, then renamed onto it."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cm_jax.errors import InputError

UNFINISHED = ".cm_jax-"
"""How the names begin of what is being written, until it is renamed."""


def user_path(name: str | Path) -> Path:
    """The path that a user names, whether there is something or not, with ~ as the home folder.

    Raises InputError for what the system does not take for a path: a name that is too long, a home that nobody has.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(name)[:80]} cannot be a path: {reason}.") from error


@contextlib.contextmanager
def atomic_write(destination: Path) -> Iterator[Path]:
    """A fresh path in the destination's folder; renamed to `destination` if the block ends well, removed if not.

    The block may write a file there or make a folder. An existing file is replaced (where `destination` is a link, the
    file that it points to); an existing folder is only if it is empty. Raises InputError where the destination cannot
    be written.
    """
    check_writable(destination)
    destination = destination.resolve()
    workspace = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=destination.parent))
        yield workspace / "new"
        if destination.is_dir() and (workspace / "new").is_dir():
            destination.rmdir()
        os.replace(workspace / "new", destination)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"Cannot write {destination}: {error.strerror or error}.") from error
    finally:
        if workspace is not None:
            shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def write_errors(destination: Path) -> Iterator[None]:
    """Around a library's call that writes a file: whatever it raises (a full disk, most likely) is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # every library has its own kinds for a failed write
        reason = str(error).strip().splitlines()
        raise InputError(
            f"Cannot write {destination}: {reason[0][:200] if reason else type(error).__name__}. "
            "Is there room on the disk?"
        ) from error


def fsync_tree(folder: Path) -> None:
    """Wait until all that is in a folder, and their names, are on the disk itself.

    Without it a rename may reach the disk before the content does: after a power cut the name is there, and the files
    under it are empty. (A killed process alone loses nothing that it had written.)
    """
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """The same for one file, or for the names in one folder, where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a folder so that, killed at any moment, it is either whole or gone."""
    doomed = path.with_name(f"{UNFINISHED}{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_writable(destination: Path, *, folder: bool | None = None) -> None:
    """Raise InputError if `destination` could not be written, as a folder or as a file where that is told.

    Nothing is made or changed: missing folders above it are made when it is written.
    """
    try:
        if not destination.name:
            raise InputError(f"{str(destination)!r} is no name for an output: name a file or a folder.")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            destination.stat()  # a link may lead to itself
        if destination.is_dir() and folder is False:
            raise InputError(f"{destination} is a folder, and a file is to be written: name another.")
        if destination.is_dir() and any(destination.iterdir()):
            raise InputError(
                f"{destination} is a folder with files in it, which are not overwritten: name another or remove it."
            )
        if destination.exists() and not destination.is_dir() and (folder or not destination.is_file()):
            raise InputError(f"{destination} is there already and is no folder: name another or remove it.")
        above = next(path for path in destination.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"Cannot write {destination}: {above} is no folder that you may write to. Name another.")
    except OSError as error:
        raise InputError(f"Cannot write {str(destination)[:200]}: {error.strerror or error}. Name another.") from error
