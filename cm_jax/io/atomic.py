"""Reading and writing files: atomic writes, errors as InputError, paths given by the user."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cm_jax.errors import InputError

UNFINISHED = ".cm_jax-"
"""Prefix of temporary names."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the small text file that Git LFS leaves in place of a file."""
LFS_REASON = "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download the file"


def user_path(name: str | Path) -> Path:
    """A path given by the user, existing or not, with ~ expanded.

    Raises InputError for names that cannot be paths: too long, or the home folder of an unknown user.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(name)[:80]} cannot be a path: {reason}.") from error


def user_cache(name: str) -> Path:
    """The folder `name` in the user's cache of this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm_jax" / name


@contextlib.contextmanager
def atomic_write(destination: Path) -> Iterator[Path]:
    """A temporary path for a file or folder, renamed to `destination` after the block, or removed if it raises.

    Replaces an existing file (the target, where `destination` is a link) and an existing empty folder. Raises
    InputError where the destination cannot be written.
    """
    check_writable(destination)
    destination = destination.resolve()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=UNFINISHED, dir=destination.parent, ignore_cleanup_errors=True
        ) as workspace:
            fresh = Path(workspace) / "new"
            yield fresh
            if destination.is_dir() and fresh.is_dir():
                destination.rmdir()
            os.replace(fresh, destination)
    except OSError as error:
        raise InputError(f"Cannot write {destination}: {error.strerror or error}.") from error


@contextlib.contextmanager
def read_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn all exceptions of a library that reads a file, most likely because it is damaged, into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library has its own kinds
        size = path.stat().st_size
        if is_lfs_pointer(path):
            raise InputError(f"{path} cannot be read: {LFS_REASON}.") from error
        raise InputError(
            f"{path} ({f'{size:,} bytes' if size else 'empty'}) is damaged: not a complete {kind} "
            f"({type(error).__name__}: {str(error)[:300]}). Download it again."
        ) from error


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS (its content was not downloaded)."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


@contextlib.contextmanager
def write_errors(destination: Path) -> Iterator[None]:
    """Turn all exceptions of a library that writes a file, most likely because the disk is full, into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library has its own kinds
        reason = str(error).strip().splitlines()
        shown = reason[0][:200] if reason else type(error).__name__
        raise InputError(f"Cannot write {destination}: {shown}. Check the free space of the disk.") from error


def fsync_tree(folder: Path) -> None:
    """Flush a folder with all its content to disk.

    Otherwise a rename may reach the disk before the content, and a power failure may leave empty files under the final
    name. (Killing the process loses nothing.)
    """
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk where the file system supports that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a folder atomically: it is either complete or gone, even if the process is killed."""
    doomed = path.with_name(f"{UNFINISHED}{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_writable(destination: Path, *, folder: bool | None = None) -> None:
    """Raise InputError if `destination` cannot be written: as a folder, as a file, or by default as either.

    Changes nothing on disk.
    """
    try:
        if not destination.name:
            raise InputError(f"Expected a file or folder to write, got {str(destination)!r}.")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            destination.stat()  # raises for a link to itself
        if destination.is_dir() and folder is False:
            raise InputError(f"Expected a file to write, got the folder {destination}; use another name.")
        if destination.is_dir() and any(destination.iterdir()):
            raise InputError(f"{destination} is a folder with files in it; use another name or remove it.")
        if destination.exists() and not destination.is_dir() and (folder or not destination.is_file()):
            raise InputError(f"{destination} exists and is not a folder; use another name or remove it.")
        above = next(path for path in destination.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"Cannot write {destination}: no permission to write to {above}. Use another name.")
    except OSError as error:
        raise InputError(
            f"Cannot write {str(destination)[:200]}: {error.strerror or error}. Use another name."
        ) from error
