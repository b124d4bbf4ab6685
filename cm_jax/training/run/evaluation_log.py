"""The evaluations of a run: when one is due, RUN/evaluations.csv, and RUN/best.json."""

import math
from typing import Any

from cm_jax.checkpoints import serialization
from cm_jax.errors import InputError, indented_list
from cm_jax.evaluation.feature_extractor import FeatureStatistics
from cm_jax.io.validation import read_json
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.evaluation_hook import Evaluator, PeriodicEvaluation
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, Log, read_metrics
from cm_jax.training.run.state_io import first_process, together
from cm_jax.types import Params


class Evaluations:
    """Those of the run in `folder`, which goes on after `done` batches; without an evaluator there are none.

    An evaluation is due when it was not made yet, which its row tells: so one that a killed run did not finish is made
    when the run goes on, and none is made twice. Of several processes each makes the whole of it with its own devices,
    so that none waits for another, and process 0 writes.

    Raises InputError where those that are there were made by other settings.
    """

    def __init__(self, chosen: TrainConfig, evaluator: Evaluator | None, folder: RunFolder, done: int) -> None:
        self._chosen, self._evaluator, self._folder = chosen, evaluator, folder
        self._known: FeatureStatistics | None = None
        self._last = 0
        self._best = math.inf
        if evaluator is not None:
            with together():
                self._read(evaluator, done)
            self._last = first_process(self._last)

    def begin(self) -> None:
        """Look at the reference: what is wrong with it is to be known before the training."""
        if self._evaluator is not None:
            with together():
                self._known = self._evaluator.look()

    def due(self, done: int) -> bool:
        """Whether one is to follow batch number `done`."""
        if self._evaluator is None or done <= self._last:
            return False
        every, size = self._evaluator.settings.every, self._chosen.batch_size
        return done >= self._chosen.batches or done * size // every > self._last * size // every

    def make(self, done: int, params: Params, log: Log) -> str:
        """Make one of the checkpoint after `done` batches, whose parameters are given; what it found, in words.

        The row is written last: it says that all is done.
        """
        evaluator, known = self._evaluator, self._known
        assert evaluator is not None
        assert known is not None, "begin() comes first"
        with together():
            values, words = evaluator.measure(params, known)
        score = self._score(float(f"{values[evaluator.leading]:.9g}"))  # as the row will have it
        best = bool(first_process(int(score < self._best)))
        if best:
            self._best = score
            self._folder.mark_best(done, values[evaluator.leading], {"evaluation": _compared(evaluator.settings)})
        log.evaluation(done, {"images": done * self._chosen.batch_size, **values})
        self._last = done
        return f"Evaluated after {done:,} batches: {words}.{' The best so far.' if best else ''}"

    def _read(self, evaluator: Evaluator, done: int) -> None:
        best, file = self._folder.path / "best.json", self._folder.path / EVALUATIONS
        if best.exists():
            found = serialization.differences(read_json(best).get("evaluation"), _compared(evaluator.settings))
            if found:
                raise InputError(
                    f"The evaluations in {self._folder.path} were made with other settings, and cannot be compared:\n"
                    f"  {indented_list(found)}\nGive the same ones, or move {file.name} and {best.name} away."
                )
        columns, rows = read_metrics(file) if file.exists() else ([], [])
        for row in rows:
            values = dict(zip(columns, row, strict=True))
            if int(row[0]) <= done:
                self._last = int(row[0])
                self._best = min(self._best, self._score(float(values.get(evaluator.leading) or "nan")))

    def _score(self, value: float) -> float:
        """Less is better."""
        assert self._evaluator is not None
        score = -value if self._evaluator.rising else value
        return score if math.isfinite(score) else math.inf


def _compared(chosen: PeriodicEvaluation) -> dict[str, Any]:
    """What must be the same in evaluations that are compared."""
    return {name: value for name, value in serialization.encode(chosen).items() if name not in PeriodicEvaluation.FREE}
