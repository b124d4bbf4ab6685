"""Safe reading of .npz files: arrays only, no pickles."""

import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cm_jax.io.atomic import LFS_REASON, is_lfs_pointer


def read_npz(path: Path, select: Callable[[list[str]], Iterable[str]]) -> dict[str, np.ndarray]:
    """The arrays with the names that `select` returns from the list of all names.

    Raises ValueError with a reason for anything wrong with the file, and any ValueError of `select`.
    """
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError(LFS_REASON if is_lfs_pointer(path) else "it is not a complete .npz file")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                names = list(select(file.files))
                _check_memory(file.zip, names)
                arrays = {name: file[name] for name in names}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} in it is not an array")
            if array.dtype.kind == "U":
                array.tolist()  # raises SystemError for invalid code points
        return arrays
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # zip, zlib and NumPy raise many kinds
        raise ValueError(f"it is damaged ({str(error) or type(error).__name__})") from error


def _check_memory(archive: zipfile.ZipFile, names: list[str]) -> None:
    """Raise ValueError if the unpacked arrays exceed the memory of the machine. A small file may unpack to any size."""
    needed = sum(entry.file_size for entry in archive.infolist() if entry.filename.removesuffix(".npy") in names)
    if not hasattr(os, "sysconf"):
        return  # Windows
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"its arrays unpack to {needed / 2**30:,.1f} GiB, and this machine has {memory / 2**30:,.1f} GiB of "
            "memory; use a machine with more memory, or fewer images"
        )
