"""A whole model of ours in one safetensors file, as the bundled ones are: easy to pass on, and to read elsewhere.

Its tensors are the leaves of the parameter tree, named by their paths ("down_0_0/residual/conv_1/kernel"); its metadata
hold the config and a CRC-32 of it and all tensors, because the format has none.
"""

import zlib
from pathlib import Path

import numpy as np

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write, write_errors
from cm_jax.io.safetensors import check_finite, check_tensors, read_metadata, read_safetensors, write_safetensors
from cm_jax.types import Params, leaves, nested

_CONFIG, _CHECKSUM = "cm_jax", "crc32"
"""The names of the metadata."""


def is_single_file(path: Path) -> bool:
    """Whether a safetensors file says that it is one of ours. Raises InputError for a damaged one."""
    return _CONFIG in read_metadata(path)


def write(path: Path, config: ModelConfig, params: Params) -> None:
    """Write a model, every tensor in the precision it has here. Raises InputError where it cannot be written."""
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in leaves(params)}
    text = config.to_json()
    metadata = {_CONFIG: text, _CHECKSUM: _checksum(text, params)}
    with atomic_write(path) as beside, write_errors(path):
        write_safetensors(beside, tensors, metadata)


def read(path: Path) -> tuple[ModelConfig, Params]:
    """Config and parameters, as NumPy arrays. Raises InputError for a file that is damaged or contradicts itself."""
    metadata = read_metadata(path)
    config = ModelConfig.from_json(metadata[_CONFIG], str(path))
    tensors = read_safetensors(path)
    wanted = {name: leaf.shape for name, leaf in leaves(config.network.shapes())}
    check_tensors(wanted, tensors, str(path))
    flat = {name: tensors[name].read() for name in wanted}
    check_finite([name for name, array in flat.items() if not np.isfinite(array).all()], str(path))
    params = nested(flat)
    if metadata.get(_CHECKSUM) != _checksum(metadata[_CONFIG], params):
        raise InputError(f"{path} is damaged: its content is not what was written. Copy it again.")
    return config, params


def _checksum(text: str, params: Params) -> str:
    """Of the config and all leaves in the order of their names."""
    total = zlib.crc32(text.encode())
    for _, leaf in sorted(leaves(params), key=lambda pair: pair[0]):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return f"{total:08x}"


def to_float16(params: Params, source: str) -> Params:
    """The same parameters rounded to float16. Raises InputError for numbers beyond its range."""
    rounded = {}
    for name, leaf in leaves(params):
        with np.errstate(over="ignore"):
            rounded[name] = np.asarray(leaf).astype(np.float16)
        if np.isinf(rounded[name]).any():
            raise InputError(f"{source} does not fit into float16, which ends at 65504: {name} holds larger numbers.")
    return nested(rounded)
