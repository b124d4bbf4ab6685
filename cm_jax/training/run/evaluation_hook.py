"""Evaluation during training: metrics of the EMA's samples, evaluations.csv, and the best checkpoint."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.former_format import renamed
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import Dataset
from cm_jax.errors import InputError, indented_list
from cm_jax.evaluation.evaluate import EvalConfig, check, evaluate, format_values
from cm_jax.evaluation.feature_extractor import FeatureExtractor, FeatureStatistics, load_inception
from cm_jax.evaluation.image_sets import ImageSet, of_dataset, of_model
from cm_jax.evaluation.references import cached_statistics, default_cache, open_reference
from cm_jax.io.validation import read_json
from cm_jax.model import Model
from cm_jax.training.config import BEST_METRICS, PeriodicEvaluation, TrainConfig
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, MetricsLog, read_metrics
from cm_jax.training.run.processes import from_first, raised_in_all
from cm_jax.types import Params

_DENOISER_STEPS = 18
_TRAINING_IMAGES = "the training images"


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates parameters: weights read, reference opened, everything checked."""

    settings: PeriodicEvaluation
    config: ModelConfig
    extractor: FeatureExtractor
    reference: ImageSet | FeatureStatistics
    reference_name: str

    @property
    def steps(self) -> tuple[int, ...]:
        return self.settings.steps or (1 if self.config.distilled else _DENOISER_STEPS,)

    @property
    def best_column(self) -> str:
        """Column of the value that chooses the best checkpoint."""
        return _column(BEST_METRICS[self.settings.metrics[0]], self.steps[0])

    @property
    def higher_is_better(self) -> bool:
        return self.settings.metrics[0] == "is"

    @property
    def description(self) -> str:
        settings = self.settings
        steps = " and ".join(map(_in_steps, self.steps))
        return (
            f"{', '.join(settings.metrics)} of {settings.count:,} images {steps}, against {self.reference_name}, every "
            f"{settings.every:,} images; the best is kept by {self.best_column}"
        )

    def reference_statistics(self) -> FeatureStatistics:
        if isinstance(self.reference, FeatureStatistics):
            return self.reference
        needs = EvalConfig(self.settings.metrics).reference_needs
        return cached_statistics(self.extractor, self.reference, needs, cache=default_cache())

    def samples(self, params: Params, steps: int) -> ImageSet:
        """The samples that `cm_jax.load` gives for a checkpoint with these parameters."""
        network = self.config.network.at_precision("float32")
        model = Model(dataclasses.replace(self.config, network=network), network.prepare(params))
        return of_model(model, model.plan(steps=steps), self.settings.count, seed=self.settings.seed, name="the run")

    def evaluate(self, params: Params, reference: FeatureStatistics) -> tuple[dict[str, float], str]:
        """{"fid_1_step": 12.3, ...} and the same in words. Raises InputError for a network that diverged."""
        values: dict[str, float] = {}
        words = []
        for steps in self.steps:
            samples, eval_config = self.samples(params, steps), EvalConfig(self.settings.metrics)
            report, _ = evaluate(self.extractor, samples, reference, eval_config, reference_name=self.reference_name)
            values |= {_column(name, steps): value for name, value in report.values.items()}
            words.append(f"{format_values(report.values)} {_in_steps(steps)}")
        return values, "; ".join(words)


def make_evaluator(settings: PeriodicEvaluation, config: ModelConfig, dataset: Dataset) -> Evaluator:
    """`dataset`: the training images. Raises InputError if the evaluation is impossible: no weights, too few images."""
    extractor, eval_config = load_inception(settings.inception), EvalConfig(settings.metrics)
    if settings.reference:
        reference = open_reference(settings.reference, eval_config.reference_needs, config.network.image_shape)
    else:
        reference = of_dataset(dataset, _TRAINING_IMAGES)
    evaluator = Evaluator(settings, config, extractor, reference, settings.reference or _TRAINING_IMAGES)
    for steps in evaluator.steps:
        model = Model(config, {})  # without parameters, to check the plan and the number of samples
        samples = of_model(model, model.plan(steps=steps), settings.count, name="the evaluation (--evaluation.count)")
        check(extractor, samples, reference, eval_config, evaluator.reference_name)
    return evaluator


class EvaluationHook:
    """Evaluations of the run in `folder`, resumed after `done` batches; without an evaluator none is ever due.

    An evaluation is due until its row is written. So one that a killed run did not finish is repeated on resuming, and
    none is made twice. With several processes, each evaluates all samples on its own devices, and process 0 writes.

    Raises InputError if the evaluations in the folder were made with other settings.
    """

    def __init__(self, config: TrainConfig, evaluator: Evaluator | None, folder: RunFolder, done: int) -> None:
        self._config, self._evaluator, self._folder = config, evaluator, folder
        self._reference: FeatureStatistics | None = None
        self._last = 0
        self._best = math.inf
        if evaluator is not None:
            with raised_in_all():
                self._read(evaluator, done)
            self._last = from_first(self._last)

    def start(self) -> None:
        """Compute the statistics of the reference, so that its errors are found before training."""
        if self._evaluator is not None:
            with raised_in_all():
                self._reference = self._evaluator.reference_statistics()

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` batches."""
        if self._evaluator is None or done <= self._last:
            return False
        every, size = self._evaluator.settings.every, self._config.batch_size
        return done >= self._config.batches or done * size // every > self._last * size // every

    def evaluate(self, done: int, params: Params, log: MetricsLog) -> str:
        """Evaluate the checkpoint after `done` batches with these parameters; a line for the user.

        The row is written last, because it marks the evaluation as complete.
        """
        evaluator, reference = self._evaluator, self._reference
        assert evaluator is not None
        assert reference is not None, "call start() first"
        with raised_in_all():
            values, words = evaluator.evaluate(params, reference)
        score = self._score(float(f"{values[evaluator.best_column]:.9g}"))  # rounded as in the row
        best = bool(from_first(int(score < self._best)))
        if best:
            self._best = score
            self._folder.mark_best(done, values[evaluator.best_column], {"evaluation": _compared(evaluator.settings)})
        log.evaluation(done, {"images": done * self._config.batch_size, **values})
        self._last = done
        return f"Evaluated after {done:,} batches: {words}.{' The best so far.' if best else ''}"

    def _read(self, evaluator: Evaluator, done: int) -> None:
        """Read the last evaluation and the best score from the folder."""
        best, table = self._folder.path / "best.json", self._folder.path / EVALUATIONS
        if best.exists():
            self._check_settings(best, evaluator.settings)
        columns, rows = read_metrics(table) if table.exists() else ([], [])
        for row in rows:
            values = dict(zip(columns, row, strict=True))
            if int(row[0]) <= done:
                self._last = int(row[0])
                self._best = min(self._best, self._score(float(values.get(evaluator.best_column) or "nan")))

    def _check_settings(self, best: Path, settings: PeriodicEvaluation) -> None:
        found = serialization.differences(renamed(read_json(best).get("evaluation")), _compared(settings))
        if found:
            raise InputError(
                f"The evaluations in {self._folder.path} were made with other settings:\n  {indented_list(found)}\n"
                f"Give the same ones, or move {EVALUATIONS} and {best.name} away."
            )

    def _score(self, value: float) -> float:
        """Lower is better."""
        assert self._evaluator is not None
        score = -value if self._evaluator.higher_is_better else value
        return score if math.isfinite(score) else math.inf


def _compared(settings: PeriodicEvaluation) -> dict[str, Any]:
    """Settings that must be equal in comparable evaluations."""
    encoded = serialization.encode(settings)
    return {name: value for name, value in encoded.items() if name not in PeriodicEvaluation.MAY_CHANGE}


def _in_steps(steps: int) -> str:
    return f"in {steps} step{'s' if steps > 1 else ''}"


def _column(name: str, steps: int) -> str:
    return f"{name}_{steps}_step{'s' if steps > 1 else ''}"
