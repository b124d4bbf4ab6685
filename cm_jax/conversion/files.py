"""Weight files of other programs, read without running any code in them and without PyTorch.

A `.pt` or `.bin` file is a zip archive: a pickle that describes the tensors, and one raw entry per storage. The pickle
is read by an unpickler that knows the few instructions and names a state dict consists of and refuses all others, so a
malicious file cannot do more than be refused. (torch.load with weights_only is as strict; it would make sampling depend
on PyTorch.)

A Flax checkpoint of before Orbax is MessagePack, which holds numbers, texts, maps and bytes, and can ask for nothing.
"""

import collections
import functools
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import msgpack
import numpy as np
import safetensors

from cm_jax.arrays import leaves
from cm_jax.conversion.rules import LazyTensor
from cm_jax.errors import InputError, listed

_STORAGES = {
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
    *(pickle.LONG_BINPUT, pickle.MEMOIZE),
)
"""What torch.save writes for dictionaries of tensors and plain numbers, in pickle protocols 2 to 5."""
_LARGEST_DESCRIPTION = 64 * 2**20
"""A description of a thousand tensors takes 0.2 MB; a larger pickle than this is not one."""


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a state dict that torch.save wrote (PyTorch 1.6 or newer), by name.

    Raises InputError for a file that is damaged, is something else, or holds anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            description = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
            if description is None or entries[description].file_size > _LARGEST_DESCRIPTION:
                raise zipfile.BadZipFile("no description of tensors in it")
            byte_order = description.removesuffix("data.pkl") + "byteorder"
            if byte_order in entries and archive.read(byte_order) != b"little":
                raise InputError(f"{path} was written on a big-endian machine: write it again on a little-endian one.")
            content = _TensorUnpickler(path, entries, description, archive.read(description)).load()
    except InputError:
        raise
    except (zipfile.BadZipFile, EOFError) as error:
        size = path.stat().st_size
        hint = "It is empty." if size == 0 else "Download it again, or save it again with torch.save."
        raise InputError(f"{path} ({size:,} bytes) is not a complete file of torch.save: {error}. {hint}") from error
    except Exception as error:  # a pickle can fail in any way; whatever it is, the file is at fault
        raise InputError(f"{path} is damaged: its list of tensors cannot be read ({error}).") from error
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


class _TensorUnpickler(pickle._Unpickler):
    """Builds LazyTensors; refuses every instruction and every global but those that a state dict consists of.

    Python's own unpickler in Python, because the one in C trusts sizes that a damaged file names.
    """

    dispatch: ClassVar[dict[int, Any]] = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _INSTRUCTIONS}

    def __init__(self, path: Path, entries: dict[str, zipfile.ZipInfo], description: str, instructions: bytes) -> None:
        super().__init__(io.BytesIO(instructions))
        self._path, self._entries, self._folder = path, entries, description.removesuffix("data.pkl")

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
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        raise InputError(
            f"{self._path} asks to run {module}.{name} while it is read, so it was refused and nothing was run. "
            "Wanted: a plain state dict of tensors. If you trust its source, load it there and save the tensors alone."
        )

    def persistent_load(self, pid: Any) -> tuple[zipfile.ZipInfo, np.dtype]:
        kind, dtype, key, _, count = pid
        entry = self._entries[f"{self._folder}data/{key}"]
        if kind != "storage" or not isinstance(dtype, np.dtype) or entry.file_size != count * dtype.itemsize:
            raise ValueError(f"storage {key} is not {count} numbers")
        return entry, dtype

    def _tensor(self, storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
        entry, dtype = storage
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and (last + 1) * dtype.itemsize > entry.file_size):
            raise ValueError(f"a tensor of shape {list(shape)} reaches outside its storage")
        path = self._path

        def read() -> np.ndarray:
            try:
                with zipfile.ZipFile(path) as archive:
                    numbers = np.frombuffer(archive.read(entry.filename), dtype)
            except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
                raise InputError(f"{path} is damaged: {error}. Download it again.") from error
            steps = [stride * dtype.itemsize for stride in strides]
            return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)

        return LazyTensor(shape, dtype, read)


def write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A state dict as torch.save writes it. Raises InputError where PyTorch is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "Writing a .pt file needs PyTorch: pip install torch, or write a diffusers folder instead (--to diffusers)."
        ) from error
    torch.save(collections.OrderedDict((name, as_torch(array)) for name, array in tensors.items()), path)


def as_torch(array: np.ndarray) -> Any:
    """A torch tensor with the array's numbers and dtype (bfloat16 too, which NumPy alone does not have)."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a safetensors file by name. Raises InputError for a damaged file."""
    dtypes = {
        "I32": np.int32,
        "U8": np.uint8,
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
    }
    try:
        with safetensors.safe_open(path, framework="np") as archive:
            parts = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118  it is no dictionary
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except Exception as error:  # safetensors raises several kinds; all of them mean this file
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete safetensors file: {error}. Download it again."
        ) from error

    def read(name: str) -> np.ndarray:
        """Opened again for every tensor, because an open file holds on to all that was read of it."""
        with safetensors.safe_open(path, framework="np") as archive:
            return archive.get_tensor(name)

    return {
        name: LazyTensor(shape, np.dtype(dtypes.get(dtype, np.int64)), functools.partial(read, name))
        for name, (shape, dtype) in found.items()
    }


_FLAX_ARRAY = 1
"""The number under which Flax stores an array: its shape, the name of its dtype, its bytes."""
_FLAX_DTYPES = {dtype.name: dtype for dtype in _STORAGES.values()}


def is_msgpack(path: Path) -> bool:
    """Whether a file begins as a MessagePack map of a few entries does, and as neither a zip nor a pickle does."""
    with path.open("rb") as file:
        first = file.read(1)
    return bool(first) and 0x81 <= first[0] <= 0x8F


def read_msgpack(path: Path, branch: str) -> dict[str, LazyTensor]:
    """Tensors under `branch` of a state that flax.serialization.to_bytes wrote, by path ("Dense_0/kernel").

    The rest of the file (optimiser states are two thirds of it) is passed over. Raises InputError for a file that is
    damaged, has no such branch, or holds anything but arrays there.
    """
    try:
        with path.open("rb") as file:
            unpacker = msgpack.Unpacker(file, ext_hook=_flax_array, max_buffer_size=0, strict_map_key=True)
            found = []
            for _ in range(unpacker.read_map_header()):
                found.append(unpacker.unpack())
                if found[-1] == branch:
                    flat = leaves(unpacker.unpack())
                    break
                unpacker.skip()
            else:
                raise InputError(
                    f"{path} has no {branch!r}, only {', '.join(map(str, found))}: give a whole checkpoint."
                )
    except InputError:
        raise
    except Exception as error:  # MessagePack raises several kinds; all of them mean this file
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete Flax checkpoint: {error!r}. Download it again."
        ) from error
    others = [name for name, leaf in flat if not isinstance(leaf, LazyTensor)]
    if others:
        raise InputError(f"{path} holds something else than arrays under {branch!r}: {listed(others)}.")
    return dict(flat)


def _flax_array(code: int, content: bytes) -> LazyTensor:
    if code != _FLAX_ARRAY:
        raise ValueError(f"a value of kind {code} where an array was wanted")
    shape, name, numbers = msgpack.unpackb(content)
    array = np.frombuffer(numbers, _FLAX_DTYPES[name]).reshape(shape)
    return LazyTensor(array.shape, array.dtype, lambda: array)
