"""Weight files of feature networks: one safetensors file each, which the user converts once.

Tensors are named by their paths in the parameter tree ("vgg16/conv1_1/kernel"); metadata hold format and kind. Nothing
is downloaded: if the file is missing, the error says how to get it.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from cm_jax.errors import InputError, indented_list, shape_complaints
from cm_jax.io.atomic import LFS_REASON, atomic_write, is_lfs_pointer, user_path, write_errors
from cm_jax.types import Params, leaves, nested

_FORMAT = "1"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A kind of weight file and the environment variable that locates it."""

    name: str
    """Name of the network in messages."""
    kind: str
    """Kind in the metadata."""
    variable: str
    """Environment variable with the path of the file."""
    recipe: str
    """Commands that create the file, one per line, indented by two spaces."""

    def find(self, given: str) -> Path:
        """The file `given`, or that of the environment variable. Raises InputError, with the recipe, without one."""
        name = given or os.environ.get(self.variable, "")
        path = user_path(name)
        if path.is_file():
            return path
        problem = f"there is no file {path}" + ("" if given else f" (from {self.variable})")
        if not name:
            problem = f"no file was given, and {self.variable} is not set"
        raise InputError(
            f"The weights of {self.name} are not part of cm_jax; {problem}. Create the file once:\n"
            f"{self.recipe}\nThen pass the file, or set {self.variable} to its path."
        )

    def save(self, path: Path, params: Params) -> None:
        """Write a parameter tree. Raises InputError if the file cannot be written."""
        tensors = {name: np.ascontiguousarray(leaf) for name, leaf in leaves(params)}
        with atomic_write(path) as beside, write_errors(path):
            beside.write_bytes(safetensors.numpy.save(tensors, metadata={"format": _FORMAT, "kind": self.kind}))

    def load(self, given: str, shapes: Params, fuller: Params | None = None) -> Params:
        """The parameter tree with these shapes, or with the `fuller` ones if the file has them, as NumPy arrays.

        Raises InputError for a missing, damaged or different file.
        """
        path = self.find(given)
        try:
            with safetensors.safe_open(path, framework="np") as archive:
                metadata = archive.metadata() or {}
                found = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118  not a dictionary
        except Exception as error:  # safetensors raises several kinds; all of them concern this file
            if is_lfs_pointer(path):
                raise InputError(f"{path} cannot be read: {LFS_REASON}.") from error
            raise InputError(
                f"{path} ({path.stat().st_size:,} bytes) is not a complete weight file of {self.name}: {error}. "
                f"Convert it again:\n{self.recipe}"
            ) from error
        kind = (metadata.get("format"), metadata.get("kind"))
        if kind != (_FORMAT, self.kind):
            raise InputError(
                f"Expected {path} to hold {self.kind} in format {_FORMAT}, got {kind[1] or 'another kind of file'} in "
                f"format {kind[0]}. Create it again:\n{self.recipe}"
            )
        expected, more = ({name: leaf.shape for name, leaf in leaves(tree or {})} for tree in (shapes, fuller))
        if (more.keys() - expected.keys()) & found.keys():
            expected = more
        complaints = shape_complaints(expected, {name: array.shape for name, array in found.items()})
        if complaints:
            raise InputError(f"{path} does not hold the weights of {self.name}:\n  {indented_list(complaints)}")
        return nested({name: found[name] for name in expected})
