"""Reading .npz files that others wrote: plain arrays, whole ones, and nothing that runs."""

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np


def read_npz(path: Path, wanted: Callable[[list[str]], Iterable[str]]) -> dict[str, np.ndarray]:
    """The arrays that are `wanted` of those whose names it is given.

    Raises ValueError, with the reason, for whatever is wrong with the file; one that `wanted` raises is passed on.
    """
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is no .npz file, or not a complete one")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                return {name: _checked(name, file[name]) for name in wanted(file.files)}
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # zip, zlib and NumPy's parser have many kinds; all of them mean this file
        raise ValueError(f"it is damaged ({str(error) or type(error).__name__})") from error


def _checked(name: str, found: np.ndarray | bytes) -> np.ndarray:
    """What np.load gives for an entry, if it is an array; a text in it, if its letters are some."""
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{name} in it is no array")
    if found.dtype.kind == "U":
        found.tolist()  # SystemError for numbers that no letter has
    return found
