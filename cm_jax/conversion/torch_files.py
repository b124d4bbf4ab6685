"""PyTorch files: reading without PyTorch and without running code, and writing .pt files.

A `.pt` file is a zip archive: a pickle that describes the tensors, and one raw entry per storage. Before PyTorch 1.6 it
was five pickles followed by the storages. A TorchScript file is an archive that also holds a program, which is ignored.
"""

import collections
import io
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cm_jax.conversion.pickles import Budget, Inert, RestrictedUnpickler, checked_key, is_plain_class
from cm_jax.errors import InputError, one_line
from cm_jax.io.atomic import read_errors
from cm_jax.io.safetensors import LazyTensor

_FLOATS = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}
_INTEGERS = {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
STORAGES = {f"{name}Storage": np.dtype(dtype) for name, dtype in (_FLOATS | _INTEGERS).items()}
_LARGEST_DESCRIPTION = 64 * 2**20
"""Bytes of the pickle that describes the tensors; 0.2 MB for a thousand tensors."""
_LARGEST_RATIO = 20
"""Of unpacked to packed bytes, and of the bytes of tensors to those of the file. torch.save does not compress,
compressed weights stay near 1, and few tensors share their numbers."""
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""Pickled magic number of torch.save before PyTorch 1.6, in protocol 2."""
_LEGACY = re.compile(rb"\x80[\x02-\x05](\x95.{8})?" + re.escape(LEGACY[2:]), re.S)
"""The same in any protocol; from 4 on, pickles are in frames."""


def is_torch(path: Path) -> bool:
    """Whether a file starts with the bytes of a torch.save file."""
    with path.open("rb") as file:
        return file.read(2) == b"PK" or is_legacy(path)


def is_legacy(path: Path) -> bool:
    """Whether a file starts with the bytes of a torch.save file before PyTorch 1.6."""
    with path.open("rb") as file:
        return _LEGACY.match(file.read(32)) is not None


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a torch.save state dict, or of the modules in a TorchScript file, by name.

    Raises InputError for a damaged file, and for a file with anything but tensors.
    """
    content = read_content(path)
    if not (isinstance(content, dict) and content and all(isinstance(each, LazyTensor) for each in content.values())):
        raise InputError(f"Expected one state dict (tensors by name) in {path}, got {not_tensors(content)}")
    tensors = {str(name): tensor for name, tensor in content.items()}
    check_bytes(path, tensors)
    return tensors


def check_bytes(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise InputError if the tensors of the file `path` need far more memory than the file has bytes.

    Tensors may share or, with a stride of 0, repeat the numbers of a storage.
    """
    needed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    _check_ratio(path, needed, "tensors that need")


def _check_ratio(path: Path, needed: int, got: str) -> None:
    if needed > _LARGEST_DESCRIPTION + _LARGEST_RATIO * (size := path.stat().st_size):
        raise InputError(
            f"Expected weights of about {size:,} bytes in {path}, got {got} {needed:,}; save a copy of each tensor "
            "(tensor.clone()) with torch.save."
        )


def not_tensors(content: Any) -> str:
    """What a file holds in place of a state dict, and what to do."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}; save the state dict alone with torch.save."
    if {"state", "param_groups"} <= content.keys():
        return "the state of an optimizer; give the file with the weights (model*.pt or ema_*.pt of an OpenAI run)."
    tensors = sum(isinstance(value, LazyTensor) for value in content.values())
    others = [f"{name} ({_described(value)})" for name, value in content.items() if not isinstance(value, LazyTensor)]
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not tensors:
        return f"a dict with {shown or 'nothing'}; save the state dict alone with torch.save."
    return f"{tensors:,} tensors and also {shown}; remove what is not a tensor, and save the rest with torch.save."


def _described(value: Any) -> str:
    """The value of a number or string, or the type."""
    plain = isinstance(value, bool | int | float | str)
    return f"{type(value).__name__} {str(value)[:20]}" if plain else type(value).__name__


def read_content(path: Path) -> Any:
    """All that torch.save wrote: LazyTensors in dictionaries and lists, numbers, and Inert for unknown objects.

    For a TorchScript file the tensors by name. Raises InputError for a damaged file, and for code in the file.
    """
    with read_errors(path, "file of torch.save"):
        content = _read_legacy(path) if is_legacy(path) else _read_zip(path)
        return dict(_script_tensors(content, Budget())) if isinstance(content, _ScriptObject) else content


class _ScriptObject(Inert):
    """An object of TorchScript."""


class Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numbers: int


class TensorUnpickler(RestrictedUnpickler):
    """Builds LazyTensors, and TorchScript modules without their code; `read` returns the bytes of a storage."""

    def __init__(self, path: Path, file: io.BufferedIOBase, read: Callable[[Storage], bytes]) -> None:
        allowed = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
            ("_codecs", "encode"): _bytes,
            ("torch.jit._pickle", "build_intlist"): list,
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            **{("torch.storage", name): dtype for name, dtype in STORAGES.items()},
        }
        super().__init__(path, file, allowed)
        self._read = read
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            return _ScriptObject
        if (module, name) not in self._allowed and is_plain_class(module, name):
            return Inert
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count, *views = pid
        known = kind == "storage" and isinstance(dtype, np.dtype) and isinstance(key, str) and isinstance(count, int)
        if not known or any(views):
            raise ValueError(f"storage {one_line(key)} is not {one_line(count)} numbers")
        storage = Storage(key, dtype, count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {key} has two descriptions")
        return storage

    def _tensor(self, storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
        return tensor_view(self._path, storage, offset, shape, strides, self._read)


def tensor_view(
    path: Path, storage: Storage, offset: int, shape: Any, strides: Any, read_storage: Callable[[Storage], bytes]
) -> LazyTensor:
    """A tensor in a storage of the file `path`. Raises ValueError where it reaches outside its storage."""
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and last >= storage.numbers):
        raise ValueError(f"a tensor of shape {list(shape)} reaches outside its storage")

    def read() -> np.ndarray:
        with read_errors(path, "file of torch.save"):
            content = read_storage(storage)
        numbers = np.frombuffer(content, storage.dtype)
        steps = [stride * storage.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)

    return LazyTensor(shape, storage.dtype, read)


def _bytes(text: str, encoding: str) -> bytes:
    """Bytes, which protocol 2 stores as text."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _ordered_dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return collections.OrderedDict((checked_key(key), value) for key, value in pairs)


def _script_tensors(module: Inert, budget: Budget, path: str = "") -> Iterator[tuple[str, LazyTensor]]:
    budget.spend()
    for name, value in dict(module.state).items():
        if isinstance(value, _ScriptObject):
            yield from _script_tensors(value, budget, f"{path}{name}.")
        elif isinstance(value, LazyTensor):
            budget.spend()
            yield f"{path}{name}", value


def _read_zip(path: Path) -> Any:
    """Content of a zip archive of torch.save."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check_ratio(path, sum(entry.file_size for entry in entries.values()), "an archive that unpacks to")
        description = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
        if description is None or entries[description].file_size > _LARGEST_DESCRIPTION:
            raise zipfile.BadZipFile("it has no description of tensors")
        folder = description.removesuffix("data.pkl")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(
                f"Expected little-endian numbers in {path}, got big-endian; save it again on a little-endian machine."
            )
        instructions = archive.read(description)

    def read(storage: Storage) -> bytes:
        with zipfile.ZipFile(path) as again:
            return again.read(f"{folder}data/{storage.key}")

    unpickler = TensorUnpickler(path, io.BytesIO(instructions), read)
    content = unpickler.load()
    for key, dtype, count in unpickler.storages.values():
        if entries[f"{folder}data/{key}"].file_size != count * dtype.itemsize:
            raise ValueError(f"storage {key} is not {count} numbers")
    return content


def _read_legacy(path: Path) -> Any:
    """Content of a torch.save file before PyTorch 1.6.

    Pickles of magic number, version, machine, tensors and storage keys; then each storage: its size in 8 bytes, and
    its numbers.
    """
    places: dict[str, int] = {}

    def read(storage: Storage) -> bytes:
        with path.open("rb") as again:
            again.seek(places[storage.key])
            return again.read(storage.numbers * storage.dtype.itemsize)

    with path.open("rb") as file:
        _, version, machine = (RestrictedUnpickler(path, file).load() for _ in range(3))
        if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise InputError(
                f"Expected a little-endian torch.save file of version 1001 in {path}, got version {one_line(version)}."
            )
        unpickler = TensorUnpickler(path, file, read)
        content = unpickler.load()
        for key in RestrictedUnpickler(path, file).load():
            storage = unpickler.storages[key] if isinstance(key, str) else None
            if storage is None or file.read(8) != storage.numbers.to_bytes(8, "little"):
                raise ValueError(f"storage {one_line(key)} has another size")
            places[key] = file.tell()
            file.seek(storage.numbers * storage.dtype.itemsize, io.SEEK_CUR)
        if file.tell() != path.stat().st_size or places.keys() != unpickler.storages.keys():
            raise EOFError("its storages are truncated, or too long")
    return content


def write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a state dict with torch.save. Raises InputError where PyTorch is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "Writing a .pt file requires PyTorch: pip install torch, or write a diffusers folder (--to diffusers)."
        ) from error
    torch.save(collections.OrderedDict((name, as_torch(array)) for name, array in tensors.items()), path)


def as_torch(array: np.ndarray) -> Any:
    """A torch tensor with the values and dtype of an array, bfloat16 included."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
