"""Flax checkpoints from before Orbax: MessagePack files, which hold only numbers, text, maps and bytes."""

from pathlib import Path

import msgpack
import numpy as np

from cm_jax.conversion.torch_files import STORAGES
from cm_jax.errors import InputError, indented_list
from cm_jax.io.safetensors import LazyTensor
from cm_jax.types import leaves

_FLAX_ARRAY = 1
"""MessagePack extension type of a Flax array: shape, dtype name, bytes."""
_FLAX_DTYPES = {dtype.name: dtype for dtype in STORAGES.values()}


def is_msgpack(path: Path) -> bool:
    """Whether a file starts like a MessagePack map of 1 to 15 entries, as no zip archive or pickle does."""
    with path.open("rb") as file:
        first = file.read(1)
    return bool(first) and 0x81 <= first[0] <= 0x8F


def read_msgpack(path: Path, branch: str) -> dict[str, LazyTensor]:
    """Tensors below `branch` of a flax.serialization.to_bytes file, by path ("Dense_0/kernel").

    The rest of the file is skipped; two thirds of it are optimizer states. Raises InputError for a damaged file, and
    where the branch is missing or holds anything but arrays.
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
                got = ", ".join(map(str, found))
                raise InputError(f"Expected {branch!r} in {path}, got only {got}; use a complete checkpoint.")
    except InputError:
        raise
    except Exception as error:  # MessagePack raises several kinds
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete Flax checkpoint: {repr(error)[:300]}. "
            "Download it again."
        ) from error
    others = [name for name, leaf in flat if not isinstance(leaf, LazyTensor)]
    if others:
        raise InputError(f"Expected arrays only under {branch!r} in {path}, got others:\n  {indented_list(others)}")
    return dict(flat)


def _flax_array(code: int, content: bytes) -> LazyTensor:
    if code != _FLAX_ARRAY:
        raise ValueError(f"expected an array, got extension type {code}")
    shape, name, numbers = msgpack.unpackb(content)
    array = np.frombuffer(numbers, _FLAX_DTYPES[name]).reshape(shape)
    return LazyTensor(array.shape, array.dtype, lambda: array)
