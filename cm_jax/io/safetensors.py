"""Safetensors files: tensors read lazily, metadata, writing."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cm_jax.errors import InputError, indented_list, shape_complaints
from cm_jax.io.atomic import read_errors

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U8": "uint8"}
"""Names in NumPy; other dtypes, which no network has, are shown as int64."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: shape and dtype, with values read on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a safetensors file by name. Raises InputError for a damaged file."""

    def read(name: str) -> np.ndarray:
        """Reopen the file for each tensor, because an open one keeps all tensors read from it in memory."""
        with safetensors.safe_open(path, framework="np") as archive:
            return archive.get_tensor(name)

    with read_errors(path, "safetensors file"), safetensors.safe_open(path, framework="np") as archive:
        parts = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118  not a dict
        dtypes = {name: np.dtype(_DTYPES.get(part.get_dtype(), "int64")) for name, part in parts.items()}
        return {
            name: LazyTensor(tuple(part.get_shape()), dtypes[name], functools.partial(read, name))
            for name, part in parts.items()
        }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file with the permissions of any new file (the library makes it private)."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file. Raises InputError for a damaged file."""
    with read_errors(path, "safetensors file"), safetensors.safe_open(path, framework="np") as archive:
        return archive.metadata() or {}


def check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], source: str) -> None:
    """Raise InputError that lists all missing, unexpected, wrong-shaped and integer tensors."""
    complaints = shape_complaints(expected, {name: tensor.shape for name, tensor in tensors.items()}) + [
        f"not floating point: {name} is {tensors[name].dtype}"
        for name in expected
        if name in tensors and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
    ]
    if complaints:
        raise InputError(
            f"{source} does not hold the tensors of one network: {len(complaints)} of {len(expected)} disagree.\n"
            f"  {indented_list(complaints)}\nCheck that the file is complete and belongs to its config."
        )


def check_finite(not_finite: Sequence[str], source: str) -> None:
    """Raise InputError if there are any tensors, given by name, with infinite or NaN values."""
    if not_finite:
        raise InputError(
            f"Expected finite values in {source}, got values that are infinite or not a number in:\n"
            f"  {indented_list(not_finite)}\nUse an earlier checkpoint of the run, or download the file again."
        )
