"""What a run measured: RUN/metrics.csv, RUN/evaluations.csv, RUN/samples/ and, for those who have it, TensorBoard's
events.

All of it is cut back to the checkpoint that a run goes on from, so that an interrupted run leaves what an unbroken one
would.
"""

import contextlib
import csv
import importlib.util
import io
import itertools
import logging
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from PIL import Image

from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write
from cm_jax.io.images import save_grid

METRICS = "metrics.csv"
EVALUATIONS = "evaluations.csv"
BATCHES = "batches"
"""The first column of both: the number of batches that the run had seen."""

_log = logging.getLogger(__name__)


class Log:
    """The measurements of the run in `run`, which goes on after `batches` batches: what was written after is dropped.

    Of several processes, process 0 writes; the others' do nothing. Raises InputError where a file cannot be written,
    or is none of ours.
    """

    def __init__(self, run: Path, batches: int = 0, *, tensorboard: bool = True) -> None:
        self._run = run
        self._silent = jax.process_index() != 0
        self._events: Any = None
        if self._silent:
            return
        self._metrics, self._evaluations = (_Table(run / name, batches) for name in (METRICS, EVALUATIONS))
        for sheet in (run / "samples").glob("*.png"):
            if sheet.stem.isdecimal() and int(sheet.stem) > batches:
                sheet.unlink()
        if tensorboard:
            self._events = _event_writer(run / "tensorboard", batches)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def row(self, batches: int, values: Mapping[str, Any]) -> None:
        """The values after so many batches. Columns are those of the first row; a new one is added at the end."""
        if self._silent:
            return
        self._metrics.add(batches, values)
        self._curves(batches, values)

    def evaluation(self, batches: int, values: Mapping[str, Any]) -> None:
        """The same for what an evaluation found, in a file of its own."""
        if self._silent:
            return
        self._evaluations.add(batches, values)
        self._curves(batches, {f"evaluation/{name}": value for name, value in values.items()})

    def samples(self, batches: int, sheet: Image.Image) -> Path:
        """Keep a grid of samples as RUN/samples/00001000.png, and say where."""
        path = self._run / "samples" / f"{batches:08d}.png"
        if not self._silent:
            save_grid(path, sheet)
            if self._events is not None:
                self._events.add_image("samples", np.asarray(sheet.convert("RGB")), batches, dataformats="HWC")
                self._events.flush()
        return path

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _curves(self, batches: int, values: Mapping[str, Any]) -> None:
        if self._events is not None:
            for name, value in values.items():
                if math.isfinite(value):  # tensorboardX complains of others, and no curve can show them
                    self._events.add_scalar(name, float(value), batches)
            self._events.flush()


class _Table:
    """A CSV file of numbers, a row for a number of batches, without those of later ones than `batches`."""

    def __init__(self, file: Path, batches: int) -> None:
        self._file = file
        self._columns: list[str] = []
        if file.exists():
            columns, rows = read_metrics(file)
            kept = [row for row in rows if int(row[0]) <= batches]
            self._rewrite(columns if kept else [], kept)

    def add(self, batches: int, values: Mapping[str, Any]) -> None:
        shown = {BATCHES: str(batches)} | {name: _shown(value) for name, value in values.items()}
        added = [name for name in shown if name not in self._columns]
        if added and self._columns:
            columns, rows = read_metrics(self._file)
            self._rewrite(columns + added, [row + [""] * len(added) for row in rows])
        lines = [] if self._columns else [added]
        self._columns = self._columns or added
        lines.append([shown.get(name, "") for name in self._columns])
        try:
            with self._file.open("ab") as file:
                file.write(_encoded(lines))
        except OSError as error:
            raise InputError(f"Cannot write {self._file}: {error.strerror}. Is there room on the disk?") from error

    def _rewrite(self, columns: list[str], rows: list[list[str]]) -> None:
        with atomic_write(self._file) as beside:
            beside.write_bytes(_encoded([columns, *rows]) if columns else b"")
        self._columns = columns


def read_metrics(file: Path) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a metrics.csv or evaluations.csv, without a last line that is not whole.

    Raises InputError for another file.
    """
    try:
        text = file.read_bytes().decode()
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        columns, rows = (lines[0], lines[1:]) if lines else ([], [])
        if (columns and columns[0] != BATCHES) or any(len(row) != len(columns) or not int(row[0]) >= 0 for row in rows):
            raise ValueError("its lines do not fit its first one")
        for value in itertools.chain.from_iterable(rows):
            float(value or "nan")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is not the {file.name} of a run ({error}): move it away, or repair it.") from error
    return columns, rows


def _shown(value: Any) -> str:
    """With nine digits, which tell a float32 exactly."""
    return str(int(value)) if isinstance(value, int | np.integer) else f"{float(value):.9g}"


def _encoded(lines: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _event_writer(folder: Path, batches: int) -> Any:
    """A writer of TensorBoard's events; None, and one line that says so, without tensorboardX."""
    if importlib.util.find_spec("tensorboardX") is None:
        _log.warning("No events for TensorBoard are written (pip install tensorboardX); metrics.csv has all numbers.")
        return None
    from tensorboardX import SummaryWriter

    before = sorted(folder.glob("events.out.tfevents.*"))
    for file in before:
        _cut_events(file, batches)
    suffix = f".{len(before)}"  # two starts in the same second would have the same name, and the second overwrite it
    return SummaryWriter(str(folder), filename_suffix=suffix)


def _cut_events(file: Path, batches: int) -> None:
    """Drop the events after so many batches, and a last one that is not whole."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]  made by protobuf at run time

    damage = (DecodeError, OverflowError, MemoryError)  # what follows it is lost
    with atomic_write(file) as beside, file.open("rb") as old, beside.open("wb") as new, contextlib.suppress(*damage):
        for record, content in _records(old):
            if Event.FromString(content).step <= batches:
                new.write(record)


def _records(file: Any) -> Iterator[tuple[bytes, bytes]]:
    """(record, content) of a TFRecord file: 8 bytes of length, 4 of checksum, the content, 4 of checksum."""
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        rest = file.read(length + 4)
        if len(rest) < length + 4:
            return
        yield head + rest, rest[:-4]
