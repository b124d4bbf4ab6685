"""Pickles of NVlabs' persistence module (EDM, EDM2, ECT, TCM, sCM), read as data.

Such a file is one pickle of a dictionary of objects. Each object carries the source text of its class, which the
original program executes. Here objects become `Record`s, the text is skipped, and no class is looked up. The storage of
each tensor is a torch.save file (of PyTorch before 1.6) inside the pickle.
"""

import contextlib
import dataclasses
import io
import math
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from cm_jax.conversion.pickles import Budget, Inert, RestrictedUnpickler, number_type
from cm_jax.conversion.torch_files import LEGACY, Storage, TensorUnpickler, is_legacy, tensor_view
from cm_jax.io.atomic import read_errors
from cm_jax.io.safetensors import LazyTensor

_STARTS = (b"\x80\x04\x95", b"\x80\x05\x95")
"""First bytes of pickles in protocols 4 and 5."""
_OPCODES = (pickle.POP, pickle.BINUNICODE8)
_LARGEST_IN_MEMORY = 2**16
"""Bytes of a storage that stays in memory; larger ones are read from the file on demand."""
_MOST_MODULES, _DEEPEST = 20_000, 16
"""Limits of the tree of modules. EDM's networks have some 500 modules, four levels deep."""


def is_persistent(path: Path) -> bool:
    """Whether a file starts like a pickle of this family, and not like one of torch.save before PyTorch 1.6."""
    with path.open("rb") as file:
        return file.read(3) in _STARTS and not is_legacy(path)


class Record(Inert):
    """An object of a file as data: the name of its class, and its attributes."""

    def __init__(self, kind: str, state: Any = None) -> None:
        super().__init__()
        self.kind, self.state = kind, state

    def part(self, name: str) -> dict[str, Any]:
        """A dictionary among the attributes, such as _buffers or _init_kwargs; empty where there is none."""
        found = self.state.get(name) if isinstance(self.state, dict) else None
        return found if isinstance(found, dict) else {}

    def modules(self) -> dict[str, "Record"]:
        """This module as "", and all modules inside by name ("model.enc.32x32_conv"). Raises ValueError for cycles."""
        found: dict[str, Record] = {}

        def add(name: str, module: Any, depth: int) -> None:
            if not isinstance(module, Record):
                raise ValueError(f"module {name[:80]} is a {type(module).__name__}")
            if depth > _DEEPEST or len(found) >= _MOST_MODULES:
                raise ValueError(f"its modules are nested too deeply, at {name[:80]}")
            found[name] = module
            for key, child in module.part("_modules").items():
                if child is not None:
                    add(f"{name}.{key}" if name else f"{key}", child, depth + 1)

        add("", self, 0)
        return found

    def tensors(self) -> dict[str, LazyTensor]:
        """Parameters and buffers under the names of a state dict. Raises ValueError for anything else among them."""
        found, budget = {}, Budget()
        for prefix, module in self.modules().items():
            for key, tensor in (module.part("_parameters") | module.part("_buffers")).items():
                budget.spend()
                name = f"{prefix}.{key}" if prefix else f"{key}"
                if isinstance(tensor, LazyTensor):
                    found[name] = tensor
                elif tensor is not None:
                    raise ValueError(f"{name[:80]} is a {type(tensor).__name__}, not a tensor")
        return found


def read_persistent(path: Path) -> dict[str, Any]:
    """The dictionary of a file: Records, tensors (read on demand), numbers, strings, and containers of them.

    Raises InputError for a damaged file, and for a file that would run anything.
    """
    with read_errors(path, "pickle of the EDM family"), path.open("rb") as file:
        content = _PersistenceUnpickler(path, file).load()
        if not isinstance(content, dict) or file.read(1):
            raise ValueError(f"it holds a {type(content).__name__}, or continues after its end")
    return content


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Bytes of the file, in memory or as a place in it."""

    path: Path
    size: int
    start: int = 0
    content: bytes | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if self.content is not None:
            yield io.BytesIO(self.content)
            return
        with self.path.open("rb") as file:
            file.seek(self.start)
            yield file


@dataclasses.dataclass(frozen=True)
class _StoredNumbers:
    """The storage of a tensor: its numbers start `skip` bytes into `source`."""

    storage: Storage
    source: _Bytes
    skip: int

    def read(self) -> bytes:
        with self.source.open() as file:
            file.seek(self.skip, io.SEEK_CUR)
            return file.read(self.storage.numbers * self.storage.dtype.itemsize)


class _PersistenceUnpickler(RestrictedUnpickler):
    """Makes Records of objects, LazyTensors of tensors, and refuses all that this family does not write."""

    dispatch: ClassVar[dict[int, Any]] = RestrictedUnpickler.dispatch | {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES
    }

    def __init__(self, path: Path, file: BinaryIO) -> None:
        arrays = ("numpy.core.multiarray", "numpy._core.multiarray")
        allowed = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
            ("collections", "OrderedDict"): _empty_dict,
            ("dnnlib.util", "EasyDict"): _empty_dict,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.storage", "_load_from_bytes"): self._stored_numbers,
            ("torch.nn.modules.container", "ModuleDict"): lambda: Record("ModuleDict"),
            ("torch.nn.modules.linear", "Linear"): lambda: Record("Linear"),
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): Inert,
            # ECT's loss function holds a method of its own, which pickle finds by getattr. It is not used here.
            ("builtins", "getattr"): Inert,
            **{(module, "_reconstruct"): Inert for module in arrays},
            **{(module, "scalar"): _scalar for module in arrays},
        }
        super().__init__(path, file, allowed)  # type: ignore[arg-type]
        self._file = file

    def load_bytes(self, header: str) -> None:
        """Bytes in memory, or their place in the file where they are many: pickles keep those outside of frames."""
        (size,) = struct.unpack(header, self.read(struct.calcsize(header)))  # type: ignore[attr-defined]
        frame = self._unframer.current_frame  # type: ignore[attr-defined]
        if size < _LARGEST_IN_MEMORY or (frame is not None and frame.tell() < frame.getbuffer().nbytes):
            self.stack.append(self.read(size))  # type: ignore[attr-defined]
            return
        start = self._file.tell()
        if start + size > self._path.stat().st_size:
            raise EOFError("it is truncated")
        self._file.seek(size, io.SEEK_CUR)
        self.stack.append(_Bytes(self._path, size, start))  # type: ignore[attr-defined]

    dispatch[pickle.BINBYTES[0]] = lambda self: self.load_bytes("<I")
    dispatch[pickle.BINBYTES8[0]] = lambda self: self.load_bytes("<Q")

    def _stored_numbers(self, content: Any) -> _StoredNumbers:
        """The only storage of a torch.save file of PyTorch before 1.6."""
        source = content if isinstance(content, _Bytes) else _Bytes(self._path, len(content), content=bytes(content))

        def no_storage(_: Storage) -> bytes:
            raise ValueError("a tensor inside of a storage")

        with source.open() as file:
            start = file.tell()
            if file.read(len(LEGACY)) != LEGACY:
                raise ValueError("a storage is not a file of torch.save")
            version, machine = (RestrictedUnpickler(self._path, file).load() for _ in range(2))  # type: ignore[arg-type]
            if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
                raise ValueError("a storage is not little-endian, or of another version")
            storage = TensorUnpickler(self._path, file, no_storage).load()  # type: ignore[arg-type]
            keys = RestrictedUnpickler(self._path, file).load()  # type: ignore[arg-type]
            if not isinstance(storage, Storage) or keys != [storage.key]:
                raise ValueError("a storage is not described by itself")
            counted = file.read(8) == storage.numbers.to_bytes(8, "little")
            skip = file.tell() - start
        if not counted or source.size - skip != storage.numbers * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} is not {storage.numbers} numbers")
        return _StoredNumbers(storage, source, skip)

    def _tensor(self, stored: _StoredNumbers, offset: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
        shape = tuple(map(int, shape))
        if not isinstance(stored, _StoredNumbers) or math.prod(shape) > stored.storage.numbers:
            raise ValueError(f"a tensor of shape {list(shape)} does not fit its storage")
        return tensor_view(self._path, stored.storage, offset, shape, strides, lambda _: stored.read())


def _persistent_object(meta: Any) -> Record:
    """The object that `meta` describes. Its source text is ignored, and its attributes may still be read later."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise ValueError("a persistent object without a state")
    kind = meta.get("class_name")
    return Record(kind[:200] if isinstance(kind, str) else "", meta["state"])


def _empty_dict(*arguments: Any) -> dict:
    if arguments:
        raise ValueError("an OrderedDict with arguments")
    return {}


def _scalar(dtype: Any, content: Any) -> float | int:
    """A NumPy scalar, as a Python number."""
    return np.frombuffer(content, number_type(dtype)).item()
