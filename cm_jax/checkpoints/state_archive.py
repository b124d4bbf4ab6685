"""Reading EMAs and single arrays from a training state, a zip of .npy files with a checksum for each array.

ARCHIVE/leaves.json            dtype and shape of every array by name
ARCHIVE/ema/power_0.1/x.npy    an array; the names are paths in the tree of the training state
"""

import contextlib
import json
import zipfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cm_jax.checkpoints.former_format import renamed_leaf
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.errors import DamagedError, InputError, indented_list, shape_complaints
from cm_jax.types import leaves

LEAVES = "leaves.json"
STATE = Path("state") / "state.npz"
"""The training state in a checkpoint of a run."""

NONE = "none"
"""Stands for the parameters without EMA."""


class Description(NamedTuple):
    """The dtype and shape of an array in an archive."""

    dtype: str
    shape: tuple[int, ...]


class StateArchive(contextlib.AbstractContextManager["StateArchive"]):
    """An archive opened for reading. Raises DamagedError for an incomplete file.

    keep: names of arrays to find under these names even if they were renamed since.
    """

    def __init__(self, file: Path, keep: Container[str] = ()) -> None:
        self.file = file
        with _damage(file):
            self._zip = zipfile.ZipFile(file)
            try:
                content = json.loads(self._zip.read(LEAVES))
                self._stored = {name if name in keep else renamed_leaf(name): name for name in content}
                self.leaves = {
                    name: Description(str(content[old]["dtype"]), tuple(content[old]["shape"]))
                    for name, old in self._stored.items()
                }
                """Every array by its present name."""
            except BaseException:
                self._zip.close()
                raise

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str, dtype: Any = None) -> np.ndarray:
        """An array, whose checksum is verified; as `dtype` where that is not the dtype in the archive.

        Raises DamagedError.
        """
        with _damage(self.file), self._zip.open(f"{self._stored[name]}.npy") as entry:
            values = np.lib.format.read_array(entry, allow_pickle=False)  # checks the checksum at the end
            if dtype is not None and values.dtype != dtype:
                values = values.view(dtype)  # .npy files store bfloat16 as two opaque bytes
            return values


class EMAName(NamedTuple):
    """An EMA as users name it: 0.9999, power_0.1, or none."""

    kind: str
    """exponential, power or none."""
    value: float = 0.0
    """Decay or relative width."""

    @classmethod
    def parse(cls, text: str) -> "EMAName | None":
        """The name in a text: 0.9999, exponential_0.9999, power_0.1, none or parameters; None for any other."""
        word = text.strip().lower()
        if word in (NONE, "parameters"):
            return cls(NONE)
        kind, _, number = word.rpartition("_")
        try:
            return cls(kind or "exponential", float(number)) if kind in ("", "exponential", "power") else None
        except ValueError:
            return None

    def __str__(self) -> str:
        return NONE if self.kind == NONE else f"power_{self.value!r}" if self.kind == "power" else repr(self.value)


def emas(archive: StateArchive) -> dict[EMAName, str]:
    """All EMAs in a training state, with the beginning of the names of their arrays."""
    found = dict.fromkeys(name.split("/")[1] for name in archive.leaves if name.startswith("ema/"))
    named = {name: f"ema/{each}/" for each in found if (name := EMAName.parse(each))}
    return named | ({EMAName(NONE): "params/"} if any(name.startswith("params/") for name in archive.leaves) else {})


def parameter_names(archive: StateArchive, place: str, config: ModelConfig) -> list[str]:
    """Names of the network's parameters, which are stored under `place`. Raises InputError if they do not fit."""
    expected = {name: tuple(leaf.shape) for name, leaf in leaves(config.network.shapes())}
    found = {name: archive.leaves[place + name].shape for name in expected if place + name in archive.leaves}
    if complaints := shape_complaints(expected, found):
        raise InputError(f"{place} in {archive.file} contradicts the config:\n  {indented_list(complaints)}")
    return list(expected)


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Turn any error of reading a file into a DamagedError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zipfile, json and NumPy raise many types
        reason = str(error).strip().splitlines()
        raise DamagedError(f"{file} is damaged or incomplete ({reason[0] if reason else error!r}).") from error
