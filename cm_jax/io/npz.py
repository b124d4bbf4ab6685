"""Safe reading of .npz files: arrays only, no pickles."""

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
                arrays = {name: file[name] for name in select(file.files)}
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
