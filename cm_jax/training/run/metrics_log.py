"""Measurements of a run: metrics.csv, evaluations.csv, samples/ and TensorBoard events.

On resuming, all of them are truncated to the checkpoint, so that an interrupted run leaves the same files as an
uninterrupted one.
"""

import csv
import io
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from PIL import Image

from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write
from cm_jax.io.images import save_grid
from cm_jax.training.run.tensorboard import event_writer

METRICS = "metrics.csv"
EVALUATIONS = "evaluations.csv"
BATCHES = "batches"
"""First column of both files: number of batches seen."""


class MetricsLog:
    """Log of the run in folder `run`, resumed after `batches`.

    With several processes, only process 0 writes. Raises InputError if a file cannot be written or is not a log.
    """

    def __init__(self, run: Path, batches: int = 0, *, tensorboard: bool = True) -> None:
        self._run = run
        self._writes = jax.process_index() == 0
        self._events: Any = None
        if not self._writes:
            return
        self._metrics, self._evaluations = (_Table(run / name, batches) for name in (METRICS, EVALUATIONS))
        for image in (run / "samples").glob("*.png"):
            if image.stem.isdecimal() and int(image.stem) > batches:
                image.unlink()
        if tensorboard:
            self._events = event_writer(run / "tensorboard", batches)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def metrics(self, batches: int, values: Mapping[str, Any]) -> None:
        """Add a row to metrics.csv. New columns are appended."""
        if self._writes:
            self._metrics.add(batches, values)
            self._add_scalars(batches, values)

    def evaluation(self, batches: int, values: Mapping[str, Any]) -> None:
        """Add a row to evaluations.csv."""
        if self._writes:
            self._evaluations.add(batches, values)
            self._add_scalars(batches, {f"evaluation/{name}": value for name, value in values.items()})

    def samples(self, batches: int, image: Image.Image) -> None:
        """Save a grid of samples as RUN/samples/00001000.png."""
        if not self._writes:
            return
        save_grid(self._run / "samples" / f"{batches:08d}.png", image)
        if self._events is not None:
            self._events.add_image("samples", np.asarray(image.convert("RGB")), batches, dataformats="HWC")
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _add_scalars(self, batches: int, values: Mapping[str, Any]) -> None:
        if self._events is not None:
            for name, value in values.items():
                if math.isfinite(value):  # tensorboardX warns about others
                    self._events.add_scalar(name, float(value), batches)
            self._events.flush()


class _Table:
    """A CSV file of numbers with one row per logged batch, truncated to `batches`."""

    def __init__(self, file: Path, batches: int) -> None:
        self._file = file
        self._columns: list[str] = []
        if file.exists():
            columns, rows = read_metrics(file)
            kept = [row for row in rows if int(row[0]) <= batches]
            self._rewrite(columns if kept else [], kept)

    def add(self, batches: int, values: Mapping[str, Any]) -> None:
        texts = {BATCHES: str(batches)} | {name: _text(value) for name, value in values.items()}
        added = [name for name in texts if name not in self._columns]
        if added and self._columns:
            columns, rows = read_metrics(self._file)
            self._rewrite(columns + added, [row + [""] * len(added) for row in rows])
        lines = [] if self._columns else [added]
        self._columns = self._columns or added
        lines.append([texts.get(name, "") for name in self._columns])
        try:
            with self._file.open("ab") as file:
                file.write(_encode(lines))
        except OSError as error:
            raise InputError(f"Cannot write {self._file}: {error.strerror}. Is the disk full?") from error

    def _rewrite(self, columns: list[str], rows: list[list[str]]) -> None:
        with atomic_write(self._file) as fresh:
            fresh.write_bytes(_encode([columns, *rows]) if columns else b"")
        self._columns = columns


def read_metrics(file: Path) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of metrics.csv or evaluations.csv without an incomplete last line.

    Raises InputError for another file.
    """
    try:
        text = file.read_bytes().decode()
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        columns, rows = (lines[0], lines[1:]) if lines else ([], [])
        if (columns and columns[0] != BATCHES) or any(len(row) != len(columns) or not int(row[0]) >= 0 for row in rows):
            raise ValueError("rows do not match the header")
        for value in itertools.chain.from_iterable(rows):
            float(value or "nan")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is not the {file.name} of a run ({error}): move it away or repair it.") from error
    return columns, rows


def _text(value: Any) -> str:
    """Nine digits represent a float32 exactly."""
    return str(int(value)) if isinstance(value, int | np.integer) else f"{float(value):.9g}"


def _encode(lines: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
