"""Weight files of PyTorch networks: one file, or shards with an index, as diffusers and transformers write them.

`diffusion_pytorch_model.safetensors.index.json` maps each tensor to its shard,
`diffusion_pytorch_model-00001-of-00002.safetensors`.
"""

import collections
import re
from pathlib import Path
from typing import Any

from cm_jax.checkpoints import weight_names
from cm_jax.checkpoints.weight_names import INDEX, SHARD
from cm_jax.conversion.torch_files import read_content, read_torch
from cm_jax.errors import InputError, indented_list
from cm_jax.io.safetensors import LazyTensor, read_safetensors
from cm_jax.io.validation import read_json


def find_weights(folder: Path) -> Path | None:
    """The weights in a folder (see weight_names.choices); None if there are none.

    Raises InputError where several files may be meant.
    """
    found = weight_names.choices([path.name for path in folder.iterdir()])
    if len(found) > 1:
        names = ", ".join(found[:8])
        raise InputError(f"Expected one network in {folder}, got {names}; give the path of one of these files.")
    return folder / found[0] if found else None


def is_sharded(path: Path) -> bool:
    """Whether a file is an index of shards or a shard."""
    return path.name.endswith(INDEX) or SHARD.fullmatch(path.name) is not None


def read_weights(path: Path) -> Any:
    """All that a weight file holds: LazyTensors in dictionaries; for an index or a shard, the tensors of all shards.

    Raises InputError for damaged files, and where shards are missing, hold a tensor twice or contradict the index.
    """
    index = path if path.name.endswith(INDEX) else None
    if match := SHARD.fullmatch(path.name):
        index = path.with_name(f"{match[1]}{match[4]}{INDEX}")
        if not index.is_file():
            return _read_numbered(path, match)
    if index:
        return _read_index(index)
    return read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_content(path)


def _read_index(index: Path) -> dict[str, LazyTensor]:
    """The tensors of an index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{index}: expected a weight_map from tensors to files; download the index again.")
    files = [index.with_name(Path(file).name) for file in dict.fromkeys(places.values())]
    outside = [file for file in dict.fromkeys(places.values()) if file != Path(file).name or not Path(file).suffix]
    if outside:
        raise InputError(f"{index}: expected names of files in its folder, got {', '.join(outside[:5])[:200]}.")
    shards = _read_shards(index, files)
    found = {name: file.name for file, tensors in shards.items() for name in tensors}
    complaints = [
        *(f"missing in {file}: {name}" for name, file in places.items() if name not in found),
        *(f"in {found[name]}, not in {file}: {name}" for name, file in places.items() if found.get(name, file) != file),
        *(f"in {file}, but not in the index: {name}" for name, file in found.items() if name not in places),
    ]
    if complaints:
        raise InputError(
            f"{index} contradicts its shards; use the index and the shards of the same checkpoint:\n"
            f"  {indented_list(complaints)}"
        )
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def _read_numbered(path: Path, match: re.Match[str]) -> dict[str, LazyTensor]:
    """The tensors of all shards of a network without an index, which are numbered from 1."""
    stem, digits, count, suffix = match[1], len(match[2]), match[3], match[4]
    if not 0 < int(count) <= 10_000:
        raise InputError(f"Expected at most 10,000 shards, got {path.name}.")
    files = [path.with_name(f"{stem}-{number:0{digits}}-of-{count}{suffix}") for number in range(1, int(count) + 1)]
    return {name: tensor for tensors in _read_shards(path, files).values() for name, tensor in tensors.items()}


def _read_shards(source: Path, files: list[Path]) -> dict[Path, dict[str, LazyTensor]]:
    """The tensors of each shard. Raises InputError that names missing shards and tensors that several shards hold."""
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{source} needs {len(files)} shards, and {len(missing)} are missing in {source.parent}; download:\n"
            f"  {indented_list(missing)}"
        )
    shards = {file: (read_safetensors if file.suffix == ".safetensors" else read_torch)(file) for file in files}
    counts = collections.Counter(name for tensors in shards.values() for name in tensors)
    twice = [
        f"{name}: {', '.join(file.name for file, tensors in shards.items() if name in tensors)}"
        for name, count in counts.items()
        if count > 1
    ]
    if twice:
        raise InputError(
            f"Expected each tensor in one shard of {source}, got {len(twice)} in several; remove the shards of other "
            f"checkpoints:\n  {indented_list(twice)}"
        )
    return shards
