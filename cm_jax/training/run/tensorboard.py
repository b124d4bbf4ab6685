"""TensorBoard event files of a run, if tensorboardX is installed."""

import contextlib
import importlib.util
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm_jax.io.atomic import atomic_write

_log = logging.getLogger(__name__)


def event_writer(folder: Path, batches: int) -> Any:
    """A SummaryWriter, after removing events later than `batches`; None, with a warning, without tensorboardX."""
    if importlib.util.find_spec("tensorboardX") is None:
        _log.warning("TensorBoard events are not written (pip install tensorboardX); metrics.csv has all numbers.")
        return None
    from tensorboardX import SummaryWriter

    files = sorted(folder.glob("events.out.tfevents.*"))
    for file in files:
        _truncate(file, batches)
    suffix = f".{len(files)}"  # otherwise two starts within a second would write the same file
    return SummaryWriter(str(folder), filename_suffix=suffix)


def _truncate(file: Path, batches: int) -> None:
    """Remove the events later than `batches`, and an incomplete last one."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]  # protobuf creates it at run time

    damage = (DecodeError, OverflowError, MemoryError)  # all events after a damaged one are lost
    with atomic_write(file) as fresh, file.open("rb") as old, fresh.open("wb") as new, contextlib.suppress(*damage):
        for record, content in records(old):
            if Event.FromString(content).step <= batches:
                new.write(record)


def records(file: Any) -> Iterator[tuple[bytes, bytes]]:
    """(record, content) of a TFRecord file: 8 bytes length, 4 bytes checksum, the content, 4 bytes checksum."""
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        rest = file.read(length + 4)
        if len(rest) < length + 4:
            return
        yield head + rest, rest[:-4]
