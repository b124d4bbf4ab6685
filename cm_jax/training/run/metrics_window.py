"""Averaging of step metrics between rows of metrics.csv."""

import math

import jax
import numpy as np

from cm_jax.errors import InputError
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.metrics_log import MetricsLog
from cm_jax.training.run.progress import Progress
from cm_jax.training.step import Curves, columns

_COUNTERS = ("skipped", "consecutive_skips")


class MetricsWindow:
    """Averages metrics over `log_every` batches. Those of a dispatch are fetched while the next one runs."""

    def __init__(self, config: TrainConfig, log: MetricsLog, progress: Progress, done: int) -> None:
        self._config, self._log, self._progress, self._done = config, log, progress, done
        self._pending: Curves | None = None
        self._values: dict[str, list[float]] = {}
        self._learning_rate = config.optimizer.learning_rate.schedule()

    def add(self, metrics: Curves) -> None:
        """Add metrics of the dispatch that has just been started."""
        previous, self._pending = self._pending, metrics
        self._fetch(previous)

    def flush(self, write: bool) -> None:
        """Fetch pending metrics; with `write`, also log a row of fewer than `log_every` batches."""
        previous, self._pending = self._pending, None
        self._fetch(previous)
        if write and self._values:
            self._write()

    def _fetch(self, metrics: Curves | None) -> None:
        if metrics is None:
            return
        host = columns(jax.device_get(metrics))
        for index in range(len(host["loss"])):
            self._done += 1
            for name, values in host.items():
                self._values.setdefault(name, []).append(float(values[index]))
            if self._done % self._config.log_every == 0:
                self._write()
        self._progress.update(self._done, float(host["loss"][-1]))
        self._check(int(host["consecutive_skips"].max()), int(host["skipped"][-1]))

    def _write(self) -> None:
        row = {name: _mean(values) for name, values in self._values.items() if name not in _COUNTERS}
        skipped = int(self._values["skipped"][-1])
        learning_rate = float(np.asarray(self._learning_rate(self._done - skipped - 1)))
        row |= {"skipped": skipped, "learning_rate": learning_rate}
        if self._progress.images_per_second:
            row["images_per_second"] = self._progress.images_per_second
        self._log.metrics(self._done, {"images": self._done * self._config.batch_size} | row)
        self._values = {}

    def _check(self, consecutive_skips: int, skipped: int) -> None:
        if consecutive_skips < self._config.max_consecutive_skips:
            return
        since = "from the first step" if skipped == self._done else f"up to batch {self._done}"
        raise InputError(
            f"The loss or its gradients were not finite in {consecutive_skips} consecutive steps, {since}. The latest "
            "checkpoint and the logs are kept. Try a lower --optimizer.learning-rate.peak, a warm-up, "
            "--optimizer.clip-norm 1 or float32."
        )


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
