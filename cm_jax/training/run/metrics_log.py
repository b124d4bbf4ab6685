"""Measurements of a run: metrics.csv, evaluations.csv, samples/ and TensorBoard events.

On resuming, tables and samples are truncated to the checkpoint, TensorBoard discards later events, and the window of
averaged metrics is restored. So an interrupted run shows the same as an uninterrupted one.
"""

import contextlib
import csv
import importlib.util
import io
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write
from cm_jax.io.images import save_grid, save_npz
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.progress import Progress
from cm_jax.training.schedules import optimizer_step
from cm_jax.training.step import Curves, columns

METRICS = "metrics.csv"
EVALUATIONS = "evaluations.csv"
BATCHES = "batches"
"""First column of both files: number of batches seen."""
LogCallback = Callable[[int, dict[str, float]], None]
"""Called with the number of batches seen and the values of a row."""
_COUNTERS = ("skipped", "consecutive_skips")

_log = logging.getLogger(__name__)


class MetricsLog(contextlib.AbstractContextManager["MetricsLog"]):
    """Log of the run in folder `run`, resumed after `batches`.

    With several processes, only process 0 writes. Raises InputError if a file cannot be written or is not a log.
    """

    def __init__(
        self, run: Path, batches: int = 0, *, tensorboard: bool = True, callback: LogCallback | None = None
    ) -> None:
        self._run = run
        self._writes = jax.process_index() == 0
        self._events: Any = None
        self._callback = callback
        if not self._writes:
            return
        self._tables = {name: _Table(run / name, batches) for name in (METRICS, EVALUATIONS)}
        for image in [*(run / "samples").glob("*.png"), *(run / "samples").glob("*.npz")]:
            if image.stem.isdecimal() and int(image.stem) > batches:
                image.unlink()
        if tensorboard and importlib.util.find_spec("tensorboardX") is None:
            _log.warning("TensorBoard events are not written (pip install tensorboardX); metrics.csv has all numbers.")
        elif tensorboard:
            from tensorboardX import SummaryWriter

            folder = run / "tensorboard"
            starts = len(list(folder.glob("events.out.tfevents.*")))  # two within a second would write the same file
            self._events = SummaryWriter(str(folder), purge_step=batches + 1, filename_suffix=f".{starts}")

    def __exit__(self, *_: object) -> None:
        self.close()

    def metrics(self, batches: int, values: Mapping[str, Any]) -> None:
        """Add a row to metrics.csv. New columns are appended."""
        self._add(METRICS, "", batches, values)

    def evaluation(self, batches: int, values: Mapping[str, Any]) -> None:
        """Add a row to evaluations.csv."""
        self._add(EVALUATIONS, "evaluation/", batches, values)

    def samples(self, batches: int, image: Image.Image | UInt8[np.ndarray, "b h w c"]) -> None:
        """Save a grid of samples as RUN/samples/00001000.png, or an array as 00001000.npz."""
        if not self._writes:
            return
        file = self._run / "samples" / f"{batches:08d}"
        if isinstance(image, np.ndarray):
            save_npz(file.with_suffix(".npz"), image, None)
            return
        save_grid(file.with_suffix(".png"), image)
        if self._events is not None:
            self._events.add_image("samples", np.asarray(image.convert("RGB")), batches, dataformats="HWC")
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _add(self, table: str, tag_prefix: str, batches: int, values: Mapping[str, Any]) -> None:
        if self._writes:
            self._tables[table].add(batches, values)
            if self._callback is not None:
                self._callback(batches, {f"{tag_prefix}{name}": float(value) for name, value in values.items()})
        if self._events is not None:
            for name, value in values.items():
                if math.isfinite(value):  # tensorboardX warns about others
                    self._events.add_scalar(f"{tag_prefix}{name}", float(value), batches)
            self._events.flush()


class _Table:
    """A CSV file of numbers with one row per logged batch, truncated to `batches`."""

    def __init__(self, file: Path, batches: int) -> None:
        self._file = file
        self._columns: list[str] = []
        if file.exists():
            names, rows = read_metrics(file)
            kept = [row for row in rows if int(row[0]) <= batches]
            self._rewrite(names if kept else [], kept)

    def add(self, batches: int, values: Mapping[str, Any]) -> None:
        texts = {BATCHES: str(batches)} | {name: _text(value) for name, value in values.items()}
        added = [name for name in texts if name not in self._columns]
        if added:
            names, rows = read_metrics(self._file) if self._columns else ([], [])
            self._rewrite(names + added, [row + [""] * len(added) for row in rows])
        try:
            with self._file.open("ab") as file:
                file.write(_encode([[texts.get(name, "") for name in self._columns]]))
        except OSError as error:
            raise InputError(f"Cannot write {self._file}: {error.strerror}. Is the disk full?") from error

    def _rewrite(self, names: list[str], rows: list[list[str]]) -> None:
        with atomic_write(self._file) as fresh:
            fresh.write_bytes(_encode([names, *rows]) if names else b"")
        self._columns = names


def read_metrics(file: Path) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of metrics.csv or evaluations.csv without an incomplete last line.

    Raises InputError for another file.
    """
    try:
        text = file.read_bytes().decode()
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        names, rows = (lines[0], lines[1:]) if lines else ([], [])
        if (names and names[0] != BATCHES) or any(len(row) != len(names) or not int(row[0]) >= 0 for row in rows):
            raise ValueError("rows do not match the header")
        for value in itertools.chain.from_iterable(rows):
            float(value or "nan")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is not the {file.name} of a run ({error}): move it away or repair it.") from error
    return names, rows


def _text(value: Any) -> str:
    """Nine digits represent a float32 exactly."""
    return str(int(value)) if isinstance(value, int | np.integer) else f"{float(value):.9g}"


def _encode(lines: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


class MetricsWindow:
    """Averages step metrics over `log_every` batches, and logs the first step too.

    configuration: its number in the history of the run, for a column of that name unless it is 0. unlogged: that of the
    window when the checkpoint was saved. Metrics of a dispatch are fetched while the next one runs.
    """

    def __init__(
        self,
        config: TrainConfig,
        log: MetricsLog,
        progress: Progress,
        done: int,
        configuration: int = 0,
        unlogged: Mapping[str, np.ndarray] = {},
    ) -> None:
        self._config, self._log, self._progress, self._done = config, log, progress, done
        self._pending: Curves | None = None
        self._values: dict[str, list[float]] = {name: values.tolist() for name, values in unlogged.items()}
        self._configuration = {"configuration": configuration} if configuration else {}
        self._learning_rate = config.optimizer.learning_rate.schedule()

    @property
    def unlogged(self) -> dict[str, np.ndarray]:
        """Metrics of the batches since the last row."""
        return {name: np.asarray(values) for name, values in self._values.items()}

    def add(self, metrics: Curves | None) -> None:
        """Add metrics of the dispatch that has just been started, and fetch those of the one before."""
        previous, self._pending = self._pending, metrics
        if previous is None:
            return
        host = columns(jax.device_get(previous))
        for index in range(len(host["loss"])):
            self._done += 1
            for name, values in host.items():
                self._values.setdefault(name, []).append(float(values[index]))
            if self._done % self._config.log_every == 0:
                self._write()
            elif self._done == 1:
                self._write(keep=True)
        self._progress.update(self._done, float(host["loss"][-1]))
        skips = int(host["consecutive_skips"].max())
        if skips >= self._config.max_consecutive_skips:
            always = int(host["skipped"][-1]) == self._done
            since = "from the first step" if always else f"up to batch {self._done}"
            raise InputError(
                f"The loss or its gradients were not finite in {skips} consecutive steps, {since}. The latest "
                "checkpoint and the logs are kept. Try a lower --optimizer.learning-rate.peak, a warm-up, "
                "--optimizer.clip-norm 1 or float32."
            )

    def flush(self, write: bool) -> None:
        """Fetch pending metrics; with `write`, also log a row of fewer than `log_every` batches."""
        self.add(None)
        if write and self._values:
            self._write()

    def _write(self, keep: bool = False) -> None:
        """Log the means of the window, and begin a new one unless `keep`."""
        row = {name: _mean(values) for name, values in self._values.items() if name not in _COUNTERS}
        skipped = int(self._values["skipped"][-1])
        step = optimizer_step(self._config, self._done - skipped - 1)
        learning_rate = float(np.asarray(self._learning_rate(step)))
        row |= {"skipped": skipped, "learning_rate": learning_rate, **self._configuration}
        if self._progress.images_per_second:
            row["images_per_second"] = self._progress.images_per_second
        self._log.metrics(self._done, {"images": self._config.images_after(self._done)} | row)
        if not keep:
            self._values = {}


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
