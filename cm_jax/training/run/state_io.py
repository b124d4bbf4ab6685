"""Training state as one file: any tree of arrays, restored bitwise identical on any devices.

The format is a zip of .npy files, as of np.savez, instead of Orbax's: every array has a checksum, so that damage is
detected; writing needs no second copy of the tree in memory; and it is a single file.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cm_jax.checkpoints.state_archive import LEAVES, StateArchive
from cm_jax.errors import DamagedError, InputError, indented_list


class Leaf(NamedTuple):
    """An array on the host."""

    dtype: str
    """float32, bfloat16, ..., or key<fry> for typed PRNG keys, which are stored as uint32."""
    shape: tuple[int, ...]
    values: np.ndarray


Leaves = dict[str, Leaf]
"""By name in the tree."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"optimizer/0/mu/kernel": leaf} for every leaf of a tree of arrays; None is not a leaf."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    assert len(named) == len(paths), "two leaves have the same name"
    return named


def to_host(tree: Any, needed: bool = True) -> Any:
    """The tree as NumPy arrays that later steps do not overwrite; of PRNG keys, their key data.

    All processes must call it: leaves that are sharded over processes are gathered one after the other.
    needed: whether this process needs the result; otherwise it only takes part in gathering, and its leaves are None.
    """
    data = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)
    for leaf in jax.tree.leaves(data):
        if needed and isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    different = {id(leaf): leaf for leaf in jax.tree.leaves(data)}  # an array may be in the tree twice
    copies = {name: _copy(leaf, needed) for name, leaf in different.items()}
    return jax.tree.map(lambda leaf: copies[id(leaf)], data)


def _copy(leaf: Any, needed: bool) -> np.ndarray | None:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        gathered = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(gathered) if needed else None
    if not needed:
        return None
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    if next(iter(leaf.devices())).platform == "cpu":
        return np.array(leaf)  # asarray would return a view, which prevents donation
    return np.asarray(leaf)


def named_arrays(tree: Any, host_tree: Any) -> Leaves:
    """Leaves by name, from a tree and the result of `to_host`."""
    values = named_leaves(host_tree)
    return {name: Leaf(str(leaf.dtype), leaf.shape, values[name]) for name, leaf in named_leaves(tree).items()}


def write(file: Path, leaves: Leaves) -> None:
    """Write a state. Raises OSError."""
    description = {name: {"dtype": leaf.dtype, "shape": leaf.shape} for name, leaf in leaves.items()}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(LEAVES, json.dumps(description, indent=1))
        for name, leaf in leaves.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(leaf.values, order="C"), allow_pickle=False)


def read(file: Path, template: Any) -> Any:
    """Read a state with the structure and placement of `template`, a tree of arrays or of their shapes.

    Former names of leaves are accepted. Raises DamagedError for an incomplete file, and InputError with all differences
    if the leaves are not those of the template.
    """
    leaves = named_leaves(template)
    with StateArchive(file, keep=leaves) as archive:
        return _read(archive, template, leaves)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Arrays that `write` wrote, by name; none if there is no file. Raises DamagedError for an incomplete one."""
    if not file.exists():
        return {}
    with StateArchive(file) as archive:
        return {name: archive.read(name) for name in archive.leaves}


def _read(archive: StateArchive, template: Any, leaves: dict[str, Any]) -> Any:
    file, found = archive.file, {name: _text(*leaf) for name, leaf in archive.leaves.items()}
    expected = {name: _text(leaf.dtype, leaf.shape) for name, leaf in leaves.items()}
    complaints = [
        *(f"missing: {name} {leaf}" for name, leaf in expected.items() if name not in found),
        *(
            f"{name}: {found[name]} in the file, {leaf} in this run"
            for name, leaf in expected.items()
            if found.get(name, leaf) != leaf
        ),
        *(f"unknown: {name} {leaf}" for name, leaf in found.items() if name not in expected),
    ]
    if complaints:
        raise InputError(
            f"{file} is of a run with other settings:\n  {indented_list(complaints)}\n"
            "Resume with the settings that it was saved with, or start in a new folder."
        )
    restored = []
    for name, leaf in leaves.items():
        stored_leaf = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        values = archive.read(name, stored_leaf.dtype)
        if values.shape != stored_leaf.shape:
            raise DamagedError(f"{file} is damaged or incomplete ({name} has another shape than in {LEAVES}).")
        restored.append(_place(values, leaf))
    return jax.tree.unflatten(jax.tree.structure(template), restored)


def _place(values: np.ndarray, like: Any) -> Any:
    """On the host or on devices, with the sharding of `like`."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return values
    sharding = like.sharding if getattr(like, "committed", True) else None
    if _is_key(like):
        impl = jax.random.key_impl(jnp.empty((), like.dtype))  # a shape has none
        return jax.device_put(jax.random.wrap_key_data(jnp.asarray(values), impl=impl), sharding)
    if sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _text(dtype: Any, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"
