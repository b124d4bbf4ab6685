"""Files that contain pickles, read without running any code in them and without PyTorch.

A `.pt` file is a zip archive: a pickle that describes the tensors, and one raw entry per storage. Before PyTorch 1.6 it
was five pickles and the storages in a row. A TorchScript file is an archive with a program too, which is passed over.
Each is read by an unpickler that knows the few instructions and names these consist of and refuses all others, so a
malicious file cannot do more than be refused. (torch.load with weights_only is as strict; it would make sampling depend
on PyTorch.) A pickle of NumPy arrays is read likewise.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from cm_jax.errors import InputError
from cm_jax.io.safetensors import LazyTensor
from cm_jax.types import leaves

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.REDUCE, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINPERSID, pickle.BINFLOAT, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2),
    *(pickle.TUPLE3, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT),
    *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.SHORT_BINSTRING, pickle.BINSTRING),
)
"""What torch.save writes for dictionaries of tensors and plain numbers, in protocols 2 to 5, from Python 2 on."""
_BYTES = (pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8)
"""What NumPy's arrays take beside these."""
_LARGEST_DESCRIPTION = 64 * 2**20
"""A description of a thousand tensors takes 0.2 MB; a larger pickle than this is not one."""
_LARGEST_RATIO = 20
"""Of an archive's content to its size. torch.save does not compress; weights that somebody compressed stay near 1."""
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number of torch.save before PyTorch 1.6, pickled."""


def is_torch(path: Path) -> bool:
    """Whether a file begins as torch.save's do."""
    with path.open("rb") as file:
        return file.read(len(_LEGACY)).startswith((b"PK", _LEGACY))


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that holds a program beside the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a state dict that torch.save wrote, or of the modules in a TorchScript file, by name.

    Raises InputError for a file that is damaged, is something else, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            legacy = file.read(len(_LEGACY)) == _LEGACY
        content = _read_legacy(path) if legacy else _read_zip(path)
        if isinstance(content, _Module):
            content = dict(content.tensors())
    except InputError:
        raise
    except (zipfile.BadZipFile, EOFError) as error:
        size = path.stat().st_size
        hint = "It is empty." if size == 0 else "Download it again, or save it again with torch.save."
        raise InputError(
            f"{path} ({size:,} bytes) is not a complete file of torch.save: {str(error)[:300]}. {hint}"
        ) from error
    except Exception as error:  # a pickle can fail in any way; whatever it is, the file is at fault
        raise InputError(f"{path} is damaged: its list of tensors cannot be read ({str(error)[:300]}).") from error
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, LazyTensor) for value in content.values())
    ):
        kind = type(content).__name__
        found = f"a {kind} with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else f"a {kind}"
        raise InputError(
            f"{path} holds {found}; wanted: one state dict, tensors by name. "
            "If it is inside, save that part alone with torch.save."
        )
    return {str(name): tensor for name, tensor in content.items()}


def read_arrays(path: Path) -> dict[str, LazyTensor]:
    """NumPy arrays of a pickled tree of dictionaries, by path ("Conv_0/kernel").

    Raises InputError for a file that is damaged, is something else, or holds anything but arrays of numbers.
    """
    try:
        tree = _ArrayUnpickler(path, io.BytesIO(path.read_bytes())).load()
        flat = {name: leaf.tensor() for name, leaf in leaves(tree)}
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete pickle of NumPy arrays: {repr(error)[:300]}. "
            "Download it again."
        ) from error
    return flat


class _Unpickler(pickle._Unpickler):
    """Refuses every instruction and every global but those that a state dict consists of.

    Python's own unpickler in Python, because the one in C trusts sizes that a damaged file names.
    """

    dispatch: ClassVar[dict[int, Any]] = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _INSTRUCTIONS}

    def __init__(self, path: Path, file: io.BufferedIOBase) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(
            f"{self._path} asks to run {module}.{name} while it is read, so it was refused and nothing was run. "
            "Wanted: a plain state dict of tensors. If you trust its source, load it there and save the tensors alone."
        )


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numbers: int


class _TensorUnpickler(_Unpickler):
    """Builds LazyTensors, whose numbers `read` gets by storage when they are asked for."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, path: Path, file: io.BufferedIOBase, read: Callable[[_Storage], bytes]) -> None:
        super().__init__(path, file)
        self._read = read
        self.storages: dict[str, _Storage] = {}

    def load_build(self) -> None:
        """BUILD gives an object attributes; a state dict's are of no use here."""
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *views = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(count, int) or any(views):
            raise ValueError(f"storage {key} is not {count} numbers")
        storage = _Storage(str(key), dtype, count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {key} is described in two ways")
        return storage

    def _tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and last >= storage.numbers):
            raise ValueError(f"a tensor of shape {list(shape)} reaches outside its storage")

        def read() -> np.ndarray:
            try:
                content = self._read(storage)
            except Exception as error:  # zip and zlib have many kinds; all of them mean this file
                raise InputError(f"{self._path} is damaged: {str(error)[:300]}. Download it again.") from error
            numbers = np.frombuffer(content, storage.dtype)
            steps = [stride * storage.dtype.itemsize for stride in strides]
            return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)

        return LazyTensor(shape, storage.dtype, read)


class _Module:
    """A module of a TorchScript file: its attributes, none of its code."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def tensors(self, path: str = "") -> Iterator[tuple[str, LazyTensor]]:
        for name, value in self.attributes.items():
            if isinstance(value, _Module):
                yield from value.tensors(f"{path}{name}.")
            elif isinstance(value, LazyTensor):
                yield f"{path}{name}", value


class _ModuleUnpickler(_TensorUnpickler):
    """Builds the modules of a TorchScript file, whose classes are named in it and not looked at."""

    dispatch: ClassVar[dict[int, Any]] = dict(_TensorUnpickler.dispatch)

    def load_newobj(self) -> None:
        kind, arguments = self.stack[-2:]  # type: ignore[attr-defined]
        if kind is not _Module or arguments != ():
            raise ValueError("an object that is no module")
        self.stack[-2:] = [_Module()]  # type: ignore[attr-defined]

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        attributes = self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1].attributes = dict(attributes)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch.jit._pickle", "build_intlist"):
            return list
        return super().find_class(module, name)


def _read_zip(path: Path) -> Any:
    """What torch.save put into a zip archive."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        unpacked, size = sum(entry.file_size for entry in entries.values()), path.stat().st_size
        if unpacked > _LARGEST_DESCRIPTION + _LARGEST_RATIO * size:
            raise InputError(
                f"{path} has {size:,} bytes and says that it unpacks to {unpacked:,}, as no weights do: refused. "
                "Save it again with torch.save."
            )
        description = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
        if description is None or entries[description].file_size > _LARGEST_DESCRIPTION:
            raise zipfile.BadZipFile("no description of tensors in it")
        folder = description.removesuffix("data.pkl")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine: write it again on a little-endian one.")
        instructions = archive.read(description)

    def read(storage: _Storage) -> bytes:
        with zipfile.ZipFile(path) as again:
            return again.read(f"{folder}data/{storage.key}")

    kind = _ModuleUnpickler if is_torchscript(path) else _TensorUnpickler
    unpickler = kind(path, io.BytesIO(instructions), read)
    content = unpickler.load()
    for key, dtype, count in unpickler.storages.values():
        if entries[f"{folder}data/{key}"].file_size != count * dtype.itemsize:
            raise ValueError(f"storage {key} is not {count} numbers")
    return content


def _read_legacy(path: Path) -> Any:
    """What torch.save wrote before PyTorch 1.6: magic number, version, machine, tensors, keys; then storage by storage.

    A storage is the count of its numbers in 8 bytes, and the numbers.
    """
    places: dict[str, int] = {}

    def read(storage: _Storage) -> bytes:
        with path.open("rb") as again:
            again.seek(places[storage.key])
            return again.read(storage.numbers * storage.dtype.itemsize)

    with path.open("rb") as file:
        _, version, machine = (_Unpickler(path, file).load() for _ in range(3))
        if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise InputError(f"{path} was written by an unknown version of PyTorch or on a big-endian machine.")
        unpickler = _TensorUnpickler(path, file, read)
        content = unpickler.load()
        for key in _Unpickler(path, file).load():
            storage = unpickler.storages[key]
            if file.read(8) != storage.numbers.to_bytes(8, "little"):
                raise ValueError(f"storage {key} is not {storage.numbers} numbers")
            places[key] = file.tell()
            file.seek(storage.numbers * storage.dtype.itemsize, io.SEEK_CUR)
        if file.tell() != path.stat().st_size or places.keys() != unpickler.storages.keys():
            raise EOFError("its numbers are cut off, or there are too many")
    return content


class _ArrayState:
    """A NumPy array or dtype while it is read: what it was made from, and the state that it was given."""

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from
        self.state: Any = None

    def tensor(self) -> LazyTensor:
        _, shape, dtype, by_columns, content = self.state
        name, order = dtype.made_from[0], dtype.state[1]
        if name not in ("f2", "f4", "f8") or order != "<" or dtype.state[2:5] != (None, None, None):
            raise ValueError(f"an array of {order}{name}")
        array = np.frombuffer(content, f"<{name}").reshape(shape, order="F" if by_columns else "C")
        return LazyTensor(array.shape, array.dtype, lambda: array)


class _ArrayUnpickler(_Unpickler):
    """Builds the arrays of a pickle of NumPy's, out of their bytes alone."""

    dispatch: ClassVar[dict[int, Any]] = _Unpickler.dispatch | {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _BYTES
    }

    def load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1].state = state  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        multiarray = ("numpy.core.multiarray", "numpy._core.multiarray")
        if (name == "_reconstruct" and module in multiarray) or (module, name) == ("numpy", "dtype"):
            return _ArrayState
        if (module, name) == ("numpy", "ndarray"):
            return None
        return super().find_class(module, name)
