"""Safe reading of .npz files: arrays only, no pickles."""

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np


def read_npz(path: Path, select: Callable[[list[str]], Iterable[str]]) -> dict[str, np.ndarray]:
    """The arrays with the names that `select` returns from the list of all names.

    Raises ValueError with a reason for anything wrong with the file, and any ValueError of `select`.
    """
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is not a complete .npz file")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                return {name: _checked(name, file[name]) for name in select(file.files)}
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # zip, zlib and NumPy raise many kinds
        raise ValueError(f"it is damaged ({str(error) or type(error).__name__})") from error


def _checked(name: str, found: np.ndarray | bytes) -> np.ndarray:
    """The array of an entry, checked to be an array, and of valid Unicode if it is text."""
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{name} in it is not an array")
    if found.dtype.kind == "U":
        found.tolist()  # raises SystemError for invalid code points
    return found
