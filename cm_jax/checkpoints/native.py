"""Our checkpoints: parameters in Orbax, the config as JSON beside them. Nothing else in the library imports Orbax.

CHECKPOINT/config.json    what the model is, with the format's version
CHECKPOINT/params/        the parameter tree, every leaf in the precision it was given in
CHECKPOINT/checksums.json CRC-32 of every leaf, because the store that Orbax writes into has none of them

A run of training keeps a row of them, with what it needs to go on beside params/:
RUN/checkpoints/00001000/ the checkpoint after 1000 batches
RUN/best.json             which of them an evaluation liked best
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
from cm_jax.io.validation import read_json
from cm_jax.types import Params, leaves


def save(directory: Path, config: ModelConfig, params: Params) -> None:
    """Write a checkpoint; it appears under its name only when it is whole.

    Raises InputError where `directory` has files in it or cannot be written.
    """
    import orbax.checkpoint as ocp  # here, because importing it takes a second that sampling from a .pt file can save

    directory = directory.absolute()
    with atomic_write(directory) as beside:
        beside.mkdir()
        (beside / "config.json").write_text(config.to_json(), "utf-8")
        checksums = {name: _checksum(leaf) for name, leaf in leaves(params)}
        (beside / _CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", "utf-8")
        # Orbax would hold the whole tree twice more while it writes; so it holds a gigabyte and files of 64 MB.
        alone = _this_process()
        handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, multiprocessing_options=alone)
        with (
            write_errors(directory),
            _silent(),
            ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
        ):
            checkpointer.save(
                beside / "params", args=ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=64 * 2**20)
            )


def rewrite_config(directory: Path, config: ModelConfig) -> None:
    """Another config.json beside the same parameters, the old one or the new one at any moment."""
    with atomic_write(directory.absolute() / "config.json") as beside, write_errors(directory):
        beside.write_text(config.to_json(), "utf-8")


def is_checkpoint(directory: Path) -> bool:
    """Whether a folder is laid out as one of ours."""
    return (directory / "config.json").is_file() and (directory / "params").is_dir()


def run_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their number of batches, rising; empty where it is no run's folder."""
    try:
        entries = list((run / "checkpoints").iterdir())
    except OSError:
        return {}
    found = {int(entry.name): entry for entry in entries if re.fullmatch("[0-9]{8,18}", entry.name)}
    return {batches: found[batches] for batches in sorted(found) if is_checkpoint(found[batches])}


def best_checkpoint(run: Path) -> int | None:
    """The number of batches of the checkpoint that is marked as the best, if one is."""
    file = run / "best.json"
    return check_int(f"{file}: batches", read_json(file).get("batches"), 0, 10**18) if file.exists() else None


def restore(
    directory: Path, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None
) -> tuple[ModelConfig, Params]:
    """Config and parameters of a checkpoint, in the saved precision or another `dtype`.

    Parameters come as NumPy arrays on the host, or, with `sharding`, as JAX arrays placed so, whatever the devices were
    that saved them. As they were saved, they are compared with their checksums where they have some.
    Raises InputError for a damaged checkpoint, or one whose config contradicts its arrays.
    """
    import orbax.checkpoint as ocp

    directory = directory.absolute()
    config = ModelConfig.from_json(
        (directory / "config.json").read_text("utf-8", "replace"), str(directory / "config.json")
    )
    try:
        alone = _this_process()
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with _silent(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            saved = checkpointer.metadata(directory / "params").item_metadata
            wanted = {name: leaf.shape for name, leaf in leaves(config.network.shapes())}
            complaints = shape_complaints(wanted, {name: leaf.shape for name, leaf in leaves(saved.tree)})
            if complaints:
                raise InputError(
                    f"{directory / 'config.json'} contradicts the parameters beside it:\n  {indented_list(complaints)}"
                )
            how = (
                ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
                if sharding is None
                else ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)
            )
            args = jax.tree.map(lambda _: how, saved.tree)
            params = checkpointer.restore(directory / "params", restore_args=args)
        if dtype is None and sharding is None:
            _check(directory / _CHECKSUMS, params)
        return config, params
    except InputError:
        raise
    except Exception as error:  # whatever Orbax and its store raise, the files are at fault
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"The parameters in {directory / 'params'} are damaged or incomplete ({reason}). Copy them again."
        ) from error


_CHECKSUMS = "checksums.json"


def _checksum(leaf: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def _check(file: Path, params: Params) -> None:
    """Raise ValueError where a leaf is not what was saved."""
    if not file.exists():
        return
    saved = read_json(file)
    wrong = [name for name, leaf in leaves(params) if saved.get(name) != _checksum(leaf)]
    if wrong:
        raise ValueError(f"the checksum of {wrong[0]} is not that of what was saved")


class _Loop(asyncio.SelectorEventLoop):
    """Drops what comes after it was closed: the store's threads go on for a while when one of them has failed."""

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        with contextlib.suppress(RuntimeError):
            return super().call_soon_threadsafe(callback, *args, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Of what nobody waits for any more."""


class _Loops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Loop()


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """While Orbax works: its warnings are not printed, nor a traceback for every thread that a closed loop turns away.

    What failed is raised all the same.
    """
    with _one_at_a_time:
        policy, log = asyncio.get_event_loop_policy(), logging.getLogger("absl")
        level = log.level
        asyncio.set_event_loop_policy(_Loops())
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(policy)
            log.setLevel(level)


def _this_process() -> Any:
    """Orbax's options for one process that saves or restores alone: of several, each would wait for all others."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
