"""A whole model in one safetensors file, like the bundled models, for copying and for reading in other programs.

Its tensors are the parameters, named by their paths ("down_0_0/residual/conv_1/kernel"). Its metadata contain the
config and a CRC-32 of config and tensors, because safetensors has no checksum.
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
"""Names of the metadata entries."""


def is_single_file(path: Path) -> bool:
    """Whether a safetensors file has the metadata of this format. Raises InputError for a damaged one."""
    return _CONFIG in read_metadata(path)


def write(path: Path, config: ModelConfig, params: Params) -> None:
    """Write a model in the current precision of its parameters. Raises InputError where `path` cannot be written."""
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in leaves(params)}
    text = config.to_json()
    with atomic_write(path) as beside, write_errors(path):
        write_safetensors(beside, tensors, {_CONFIG: text, _CHECKSUM: _checksum(text, params)})


def read(path: Path) -> tuple[ModelConfig, Params]:
    """Config and parameters, as NumPy arrays. Raises InputError for a damaged or contradictory file."""
    metadata = read_metadata(path)
    config = ModelConfig.from_json(metadata[_CONFIG], str(path))
    tensors = read_safetensors(path)
    expected = {name: leaf.shape for name, leaf in leaves(config.network.shapes())}
    check_tensors(expected, tensors, str(path))
    flat = {name: tensors[name].read() for name in expected}
    check_finite([name for name, array in flat.items() if not np.isfinite(array).all()], str(path))
    params = nested(flat)
    if metadata.get(_CHECKSUM) != _checksum(metadata[_CONFIG], params):
        raise InputError(f"{path} is damaged: its checksum does not match. Copy it again.")
    return config, params


def _checksum(text: str, params: Params) -> str:
    """Checksum of the config and of all parameters in the order of their names."""
    total = zlib.crc32(text.encode())
    for _, leaf in sorted(leaves(params), key=lambda pair: pair[0]):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return f"{total:08x}"


def to_float16(params: Params, source: str) -> Params:
    """The parameters rounded to float16. Raises InputError for values outside its range."""
    rounded = {}
    for name, leaf in leaves(params):
        with np.errstate(over="ignore"):
            rounded[name] = np.asarray(leaf).astype(np.float16)
        if np.isinf(rounded[name]).any():
            raise InputError(f"Expected values in [-65504, 65504] for float16, got larger ones in {name} of {source}.")
    return nested(rounded)
