"""Native checkpoints: a folder with parameters in Orbax and the config as JSON, or a single safetensors file.

CHECKPOINT/config.json     the model config, with the version of the format
CHECKPOINT/params/         the parameter tree, in the precision in which it was saved
CHECKPOINT/checksums.json  CRC-32 of every parameter, because the Orbax store has no checksums of array data

A training run keeps several of them, each with a training state in addition to params/:
RUN/checkpoints/00001000/  the checkpoint after 1000 batches
RUN/best.json              the number of the best evaluated checkpoint

A single file is for copying and for other programs. Its tensors are named by their paths in the parameter tree
("down_0_0/residual/conv_1/kernel"); its metadata contain the config and a CRC-32 of config and tensors, because
safetensors has no checksum. No other module imports Orbax.
"""

import asyncio
import contextlib
import json
import logging
import re
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.errors import InputError, check_int, indented_list, shape_complaints
from cm_jax.io.atomic import atomic_write, write_errors
from cm_jax.io.safetensors import check_finite, check_tensors, read_metadata, read_safetensors, write_safetensors
from cm_jax.io.validation import read_json
from cm_jax.types import Params, leaves, nested

_CHECKSUMS = "checksums.json"
_CONFIG, _CHECKSUM = "cm_jax", "crc32"
"""Names of the metadata entries of a single file."""


def save(directory: Path, config: ModelConfig, params: Params) -> None:
    """Write a checkpoint atomically. Raises InputError where `directory` is not empty or cannot be written."""
    import orbax.checkpoint as ocp  # takes a second, which sampling from a .pt file does not need

    directory = directory.absolute()
    with atomic_write(directory) as beside:
        beside.mkdir()
        (beside / "config.json").write_text(config.to_json(), "utf-8")
        checksums = {name: _crc32(leaf) for name, leaf in leaves(params)}
        (beside / _CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", "utf-8")
        # By default Orbax holds two more copies of the parameters while it writes.
        args = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=64 * 2**20)
        with write_errors(directory), _checkpointer(save_concurrent_gb=1) as checkpointer:
            checkpointer.save(beside / "params", args=args)


def read_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint. Raises InputError for an invalid one."""
    file = directory.absolute() / "config.json"
    return ModelConfig.from_json(file.read_text("utf-8", "replace"), str(file))


def rewrite_config(directory: Path, config: ModelConfig) -> None:
    """Replace config.json atomically."""
    with atomic_write(directory.absolute() / "config.json") as beside, write_errors(directory):
        beside.write_text(config.to_json(), "utf-8")


def is_checkpoint(directory: Path) -> bool:
    """Whether a folder has the layout of a native checkpoint."""
    return (directory / "config.json").is_file() and (directory / "params").is_dir()


def run_checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints of a training run by number of batches, ascending; empty for any other folder."""
    try:
        entries = list((run / "checkpoints").iterdir())
    except OSError:
        return {}
    found = {int(entry.name): entry for entry in entries if re.fullmatch("[0-9]{8,18}", entry.name)}
    return {batches: found[batches] for batches in sorted(found) if is_checkpoint(found[batches])}


def last_config(run: Path) -> ModelConfig | None:
    """The config of the latest checkpoint of a training run whose config is readable; None if there is none."""
    for directory in reversed(run_checkpoints(run).values()):
        with contextlib.suppress(OSError, InputError):
            return read_config(directory)
    return None


def best_checkpoint(run: Path) -> int | None:
    """Number of batches of the best evaluated checkpoint; None before the first evaluation."""
    file = run / "best.json"
    return check_int(f"{file}: batches", read_json(file).get("batches"), 0, 10**18) if file.exists() else None


def restore(
    directory: Path, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None
) -> tuple[ModelConfig, Params]:
    """Config and parameters of a checkpoint, in the saved precision or in `dtype`.

    Parameters are NumPy arrays, or with `sharding` JAX arrays on any devices. Without `dtype` and `sharding` they are
    compared with their checksums. Raises InputError for a damaged checkpoint, and for a config that contradicts the
    parameters.
    """
    import orbax.checkpoint as ocp

    file, params_folder = directory.absolute() / "config.json", directory.absolute() / "params"
    config = read_config(directory)
    if sharding is None:
        how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    else:
        how = ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)
    try:
        with _checkpointer() as checkpointer:
            saved = checkpointer.metadata(params_folder).item_metadata
            expected = {name: leaf.shape for name, leaf in leaves(config.network.shapes())}
            if complaints := shape_complaints(expected, {name: leaf.shape for name, leaf in leaves(saved.tree)}):
                listing = indented_list(complaints)
                raise InputError(f"{file} contradicts the parameters in {params_folder}:\n  {listing}")
            params = checkpointer.restore(params_folder, restore_args=jax.tree.map(lambda _: how, saved.tree))
        checksums = directory / _CHECKSUMS
        if dtype is None and sharding is None and checksums.exists():  # old checkpoints have none
            recorded = read_json(checksums)
            wrong = next((name for name, leaf in leaves(params) if recorded.get(name) != _crc32(leaf)), None)
            if wrong is not None:
                raise ValueError(f"the checksum of {wrong} is not that of the saved array")
        return config, params
    except InputError:
        raise
    except Exception as error:  # Orbax and its store raise many kinds
        reason = [*str(error).strip().splitlines(), type(error).__name__][0][:200]
        problem = f"The parameters in {params_folder} are damaged or incomplete ({reason})"
        raise InputError(f"{problem}. Copy them again.") from error


def is_single_file(path: Path) -> bool:
    """Whether a safetensors file has the metadata of this format. Raises InputError for a damaged one."""
    return _CONFIG in read_metadata(path)


def save_file(path: Path, config: ModelConfig, params: Params) -> None:
    """Write a single file in the precision of the parameters. Raises InputError where `path` cannot be written."""
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in leaves(params)}
    text = config.to_json()
    with atomic_write(path) as beside, write_errors(path):
        write_safetensors(beside, tensors, {_CONFIG: text, _CHECKSUM: _file_checksum(text, tensors)})


def restore_file(path: Path) -> tuple[ModelConfig, Params]:
    """Config and NumPy parameters of a single file. Raises InputError for a damaged or contradictory file."""
    metadata = read_metadata(path)
    config = ModelConfig.from_json(metadata[_CONFIG], str(path))
    tensors = read_safetensors(path)
    expected = {name: leaf.shape for name, leaf in leaves(config.network.shapes())}
    check_tensors(expected, tensors, str(path))
    params = {name: tensors[name].read() for name in expected}
    check_finite([name for name, array in params.items() if not np.isfinite(array).all()], str(path))
    if metadata.get(_CHECKSUM) != _file_checksum(metadata[_CONFIG], params):
        raise InputError(f"{path} is damaged: its checksum does not match. Copy it again.")
    return config, nested(params)


def _file_checksum(text: str, tensors: dict[str, np.ndarray]) -> str:
    """Checksum of the config and of all tensors in the order of their names."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = _crc32(tensors[name], total)
    return f"{total:08x}"


def _crc32(array: Any, start: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


def to_float16(params: Params, source: str) -> Params:
    """The parameters rounded to float16. Raises InputError for values outside its range."""
    rounded = {}
    for name, leaf in leaves(params):
        with np.errstate(over="ignore"):
            rounded[name] = np.asarray(leaf).astype(np.float16)
        if np.isinf(rounded[name]).any():
            raise InputError(f"Expected values in [-65504, 65504] for float16, got larger ones in {name} of {source}.")
    return nested(rounded)


class _Loop(asyncio.SelectorEventLoop):
    """Ignores calls after it was closed: threads of the store continue for a while after one of them has failed."""

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        with contextlib.suppress(RuntimeError):
            return super().call_soon_threadsafe(callback, *args, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Ignore exceptions of abandoned tasks."""


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _checkpointer(**options: Any) -> Iterator[Any]:
    """An Orbax checkpointer for this process alone, without warnings or tracebacks of its threads in the output.

    With the default options, each of several processes would wait for all others. Errors are raised as usual.
    """
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **options)
    with _one_at_a_time:
        policy, log = asyncio.get_event_loop_policy(), logging.getLogger("absl")
        level = log.level
        quiet = asyncio.DefaultEventLoopPolicy()
        quiet.new_event_loop = _Loop
        asyncio.set_event_loop_policy(quiet)
        log.setLevel(logging.ERROR)
        try:
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                yield checkpointer
        finally:
            asyncio.set_event_loop_policy(policy)
            log.setLevel(level)
