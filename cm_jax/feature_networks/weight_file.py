"""Weights of the networks that judge images: one safetensors file each, which the user converts once.

Its tensors are the leaves of a parameter tree, named by their paths ("vgg16/conv1_1/kernel"); its metadata say the
format and the kind. Nothing is fetched: where there is no file, the message says how to get one.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from cm_jax.errors import InputError, indented_list, shape_complaints
from cm_jax.io.atomic import atomic_write, user_path, write_errors
from cm_jax.types import Params, leaves, nested

_FORMAT = "1"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One kind of weight file, and where the user may keep it."""

    kind: str
    """As its metadata say it."""
    variable: str
    """The environment variable that names it."""
    recipe: str
    """How to get it: commands, one a line."""

    def find(self, given: str) -> Path:
        """The file that `given` names, else the environment variable. Raises InputError, with the recipe, for none."""
        name = given or os.environ.get(self.variable, "")
        if not name:
            found = f"no file was named, and {self.variable} is not set"
        elif not (path := user_path(name)).is_file():
            found = f"there is no file {path}" + ("" if given else f", which {self.variable} names")
        else:
            return path
        raise InputError(
            f"The weights of {self.kind} are not part of cm_jax; {found}. Get them once:\n  "
            + self.recipe.replace("\n", "\n  ")
            + f"\nThen name the file, or set {self.variable} to it."
        )

    def save(self, path: Path, params: Params) -> None:
        """Write a parameter tree. Raises InputError where it cannot be written."""
        tensors = {name: np.ascontiguousarray(leaf) for name, leaf in leaves(params)}
        with atomic_write(path) as beside, write_errors(path):
            beside.write_bytes(safetensors.numpy.save(tensors, metadata={"format": _FORMAT, "kind": self.kind}))

    def load(self, given: str, shapes: Params, fuller: Params | None = None) -> Params:
        """The parameter tree of these shapes, or of the `fuller` ones, as NumPy arrays in their dtype.

        Raises InputError for a file that has another.
        """
        path = self.find(given)
        try:
            with safetensors.safe_open(path, framework="np") as archive:
                metadata = archive.metadata() or {}
                found = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118  it is no dictionary
        except Exception as error:  # safetensors raises several kinds; all of them mean this file
            raise InputError(
                f"{path} ({path.stat().st_size:,} bytes) is not a complete weight file of {self.kind}: {error}. "
                f"Convert it again:\n  " + self.recipe.replace("\n", "\n  ")
            ) from error
        told = (metadata.get("format"), metadata.get("kind"))
        if told != (_FORMAT, self.kind):
            raise InputError(
                f"{path} says that it is {told[1] or 'of another program'} in format {told[0]}; wanted {self.kind} in "
                f"format {_FORMAT}, which is written so:\n  " + self.recipe.replace("\n", "\n  ")
            )
        wanted = {name: leaf.shape for name, leaf in leaves(shapes)}
        more = {name: leaf.shape for name, leaf in leaves(fuller or {})}
        wanted = more if (more.keys() - wanted.keys()) & found.keys() else wanted
        complaints = shape_complaints(wanted, {name: array.shape for name, array in found.items()})
        if complaints:
            raise InputError(f"{path} does not hold the weights of {self.kind}:\n  {indented_list(complaints)}")
        return nested({name: found[name] for name in wanted})
