"""The state of a training run as one file: any tree of arrays, bit for bit, on any devices.

It is a zip of .npy files, which np.load opens, and not Orbax's format: every array has a checksum, so that a damaged
file is found out and never trained on; writing needs no second copy of the tree in memory; and it is one file.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from cm_jax.errors import InputError, indented_list

_LEAVES = "leaves.json"
_LONGEST_MESSAGE = 2000


class DamagedError(InputError):
    """The file cannot be read whole; an older checkpoint may help."""


class Leaf(NamedTuple):
    """An array on the host."""

    dtype: str
    """float32, bfloat16, ..., or key<fry> for typed random keys, whose numbers are uint32."""
    shape: tuple[int, ...]
    numbers: np.ndarray


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"optimizer/0/mu/kernel": leaf} for every leaf of a tree of any kind. None is no leaf."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    assert len(named) == len(paths), "two leaves with the same name"
    return named


def on_host(tree: Any) -> Any:
    """The tree with NumPy arrays that nothing on the devices will overwrite; of a random key, its numbers.

    All processes must call it: leaves that are spread over their devices are gathered, one after the other.
    """
    numbers = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)
    for leaf in jax.tree.leaves(numbers):
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    different = {id(leaf): leaf for leaf in jax.tree.leaves(numbers)}  # an array may be in the tree twice
    copies = {name: _copied(leaf) for name, leaf in different.items()}
    return jax.tree.map(lambda leaf: copies[id(leaf)], numbers)


def _copied(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        leaf = leaf.addressable_data(0)
    if next(iter(leaf.devices())).platform == "cpu":
        return np.array(leaf)  # asarray would be a view, and keep the next step from reusing the memory
    return np.asarray(leaf)


def described(tree: Any, copies: Any) -> dict[str, Leaf]:
    """The leaves of a tree by name, from the tree and what `on_host` made of it."""
    numbers = named_leaves(copies)
    return {name: Leaf(*_kind(leaf), numbers[name]) for name, leaf in named_leaves(tree).items()}


def write(file: Path, leaves: dict[str, Leaf]) -> None:
    """Write a state. Raises OSError."""
    description = {name: {"dtype": leaf.dtype, "shape": leaf.shape} for name, leaf in leaves.items()}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_LEAVES, json.dumps(description, indent=1))
        for name, leaf in leaves.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(leaf.numbers, order="C"), allow_pickle=False)


def read(file: Path, template: Any) -> Any:
    """The state in a file, in the structure of `template`, a tree of arrays or of their shapes, and placed as they are.

    Raises DamagedError where the file is not whole, and InputError where it holds something else than the template,
    naming all that differs.
    """
    wanted = named_leaves(template)
    with _whole(file), zipfile.ZipFile(file) as archive:
        description = json.loads(archive.read(_LEAVES))
        found = {name: (leaf["dtype"], tuple(leaf["shape"])) for name, leaf in description.items()}
    complaints = _differences({name: _kind(leaf) for name, leaf in wanted.items()}, found)
    if complaints:
        raise InputError(
            f"{file} is of a run with other settings:\n  {indented_list(complaints)}\n"
            "Start with the settings that it was saved with, or in a new folder."
        )
    placed = []
    for name, leaf in wanted.items():
        with _whole(file), zipfile.ZipFile(file) as archive:
            numbers = _numbers(archive, name, found[name][0])
            if numbers.shape != _numbers_shape(leaf):
                raise ValueError(f"{name} has another shape than is written in {_LEAVES}")
        placed.append(_placed(numbers, leaf))
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def _numbers(archive: zipfile.ZipFile, name: str, dtype: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as entry:
        numbers = np.lib.format.read_array(entry, allow_pickle=False)  # at its end the checksum is compared
    if dtype.startswith("key<"):
        dtype = "uint32"
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))  # .npy files have no name for bfloat16: two bytes of anything
    return numbers if numbers.dtype == kind else numbers.view(kind)


def _numbers_shape(leaf: Any) -> tuple[int, ...]:
    """Of the array that holds a leaf: a random key is two numbers or more."""
    return jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf) else np.shape(leaf)


def _placed(numbers: np.ndarray, like: Any) -> Any:
    """As `like` is: on the host, or on the devices in its sharding."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return numbers
    sharding = like.sharding if getattr(like, "committed", True) else None
    if _is_key(like):
        kinds: list[Any] = []
        jax.eval_shape(lambda keys: kinds.append(jax.random.key_impl(keys)), like)  # of shapes alone it tells nothing
        keys = jax.random.wrap_key_data(jnp.asarray(numbers), impl=kinds[0])
        return keys if sharding is None else jax.device_put(keys, sharding)
    if sharding is None:
        return jnp.asarray(numbers)
    return jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> tuple[str, tuple[int, ...]]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), tuple(leaf.shape)


def _differences(wanted: dict[str, tuple[str, tuple]], found: dict[str, tuple[str, tuple]]) -> list[str]:
    def shown(leaf: tuple[str, tuple]) -> str:
        return f"{leaf[0]} {list(leaf[1])}"

    return [
        *(f"not in it: {name} {shown(leaf)}" for name, leaf in wanted.items() if name not in found),
        *(
            f"{name} is {shown(found[name])} there, this run's is {shown(leaf)}"
            for name, leaf in wanted.items()
            if name in found and found[name] != leaf
        ),
        *(f"only in it: {name} {shown(leaf)}" for name, leaf in found.items() if name not in wanted),
    ]


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zip, JSON and NumPy have many kinds; all of them mean this file
        reason = str(error).strip().splitlines()
        raise DamagedError(f"{file} is damaged or incomplete ({reason[0] if reason else error!r}).") from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what may fail in one of several processes: an InputError there is raised in all, so that none is left
    waiting for the others. All processes must come here.
    """
    failure: InputError | None = None
    try:
        yield
    except InputError as error:
        failure = error
    if jax.process_count() > 1:
        mine = np.zeros(_LONGEST_MESSAGE, np.uint8)
        text = str(failure or "").encode()[:_LONGEST_MESSAGE]
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        damaged = np.asarray([isinstance(failure, DamagedError)])
        messages, kinds = multihost_utils.process_allgather((mine, damaged))
        for process, (message, kind) in enumerate(zip(messages, kinds, strict=True)):
            if message.any() and failure is None:
                said = f"process {process}: {bytes(message[message > 0]).decode(errors='replace')}"
                failure = DamagedError(said) if kind.any() else InputError(said)
    if failure is not None:
        raise failure


def first_process(number: int) -> int:
    """Process 0's number, in all processes. All must call it."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))
