"""MessagePack files of Flax programs, and writing .pt files.

A Flax checkpoint of before Orbax is MessagePack, which holds numbers, texts, maps and bytes, and can ask for nothing.
"""

import collections
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from cm_jax.conversion.pickles import STORAGES
from cm_jax.errors import InputError, indented_list
from cm_jax.io.safetensors import LazyTensor
from cm_jax.types import leaves


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


_FLAX_ARRAY = 1
"""The number under which Flax stores an array: its shape, the name of its dtype, its bytes."""
_FLAX_DTYPES = {dtype.name: dtype for dtype in STORAGES.values()}


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
            f"{path} ({path.stat().st_size:,} bytes) is not a complete Flax checkpoint: {repr(error)[:300]}. "
            "Download it again."
        ) from error
    others = [name for name, leaf in flat if not isinstance(leaf, LazyTensor)]
    if others:
        raise InputError(f"{path} holds something else than arrays under {branch!r}: {indented_list(others)}.")
    return dict(flat)


def _flax_array(code: int, content: bytes) -> LazyTensor:
    if code != _FLAX_ARRAY:
        raise ValueError(f"a value of kind {code} where an array was wanted")
    shape, name, numbers = msgpack.unpackb(content)
    array = np.frombuffer(numbers, _FLAX_DTYPES[name]).reshape(shape)
    return LazyTensor(array.shape, array.dtype, lambda: array)
