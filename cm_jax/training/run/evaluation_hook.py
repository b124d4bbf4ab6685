"""Samples of the EMA during training: grids, metrics in evaluations.csv, and the best checkpoint."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.former_format import renamed
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import Dataset
from cm_jax.errors import InputError, indented_list
from cm_jax.evaluation.evaluate import EvalConfig, check, evaluate, format_values
from cm_jax.evaluation.features import (
    FeatureExtractor,
    FeatureStatistics,
    Reference,
    load_inception,
    open_reference,
    reference_statistics,
)
from cm_jax.evaluation.image_sets import of_dataset, of_model
from cm_jax.io.atomic import user_cache
from cm_jax.io.images import fits_png, grid, quantize
from cm_jax.io.validation import read_json
from cm_jax.model import Model
from cm_jax.parallelism import Parallelism
from cm_jax.parallelism.processes import from_first, raised_in_all
from cm_jax.training.config import BEST_METRICS, PeriodicEvaluation, TrainConfig
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, MetricsLog, read_metrics
from cm_jax.types import Params

_DENOISER_STEPS = 18
_GRID_ROWS, _GRID_COLUMNS, _GRID_SEED = 9, 10, 0


def sample_grid(config: ModelConfig, params: Params) -> Image.Image | UInt8[np.ndarray, "b h w c"]:
    """Ten samples per row: of a consistency model five in one step and five in two, of a denoiser in 18 Heun steps.

    A progressively distilled denoiser takes the steps that it was trained for. Each row is a class, if there are
    classes: all of them, or nine evenly spaced ones. The noise is always the same.
    Images that a PNG file cannot hold are returned as an array, row by row.
    """
    model = Model(config, params)
    classes = config.network.classes
    rows = np.linspace(0, classes - 1, min(_GRID_ROWS, classes)).astype(int) if classes else np.arange(_GRID_ROWS)
    names = [config.class_names[row] if config.class_names else f"class {row}" for row in rows] if classes else ()

    half, blocks, denoiser_steps = _GRID_COLUMNS // 2, [], config.default_steps or _DENOISER_STEPS
    for columns, steps in [(half, 1), (half, 2)] if config.distilled else [(_GRID_COLUMNS, denoiser_steps)]:
        labels = np.repeat(rows, columns) if classes else None
        images = quantize(model.sample(_GRID_SEED, len(rows) * columns, labels=labels, steps=steps))
        blocks.append(images.reshape(len(rows), columns, *images.shape[1:]))
    images = np.concatenate(blocks, axis=1).reshape(-1, *config.network.image_shape)
    return grid(images, _GRID_COLUMNS, names) if fits_png(images.shape[3], rgba=False) else images


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates parameters: weights read, reference opened, everything checked."""

    settings: PeriodicEvaluation
    config: ModelConfig
    extractor: FeatureExtractor
    reference: Reference

    @property
    def steps(self) -> tuple[int, ...]:
        return self.settings.steps or (self.config.default_steps or (1 if self.config.distilled else _DENOISER_STEPS),)

    @property
    def best_column(self) -> str:
        """Column of the value that chooses the best checkpoint."""
        return f"{BEST_METRICS[self.settings.metrics[0]]}_{_steps(self.steps[0], '_')}"

    @property
    def description(self) -> str:
        metrics, steps = ", ".join(self.settings.metrics), " and in ".join(map(_steps, self.steps))
        return (
            f"{metrics} of {self.settings.count:,} images in {steps}, against {self.reference.name}, every "
            f"{self.settings.every:,} images; the best is kept by {self.best_column}"
        )

    def score(self, value: float) -> float:
        """A value of the first metric such that lower is better; infinite if it is not finite."""
        score = -value if self.settings.metrics[0] == "is" else value
        return score if math.isfinite(score) else math.inf

    def reference_statistics(self) -> FeatureStatistics:
        return reference_statistics(self.extractor, self.reference, EvalConfig(self.settings.metrics).needs)

    def evaluate(self, params: Params, reference: FeatureStatistics) -> tuple[dict[str, float], str]:
        """{"fid_1_step": 12.3, ...} and the same in words. Raises InputError for a network that diverged."""
        settings, eval_config = self.settings, EvalConfig(self.settings.metrics)
        network = self.config.network.at_precision("float32")  # as of `cm_jax.load`
        model = Model(
            dataclasses.replace(self.config, network=network), network.prepare(params), self.extractor.parallelism
        )
        values: dict[str, float] = {}
        words = []
        for steps in self.steps:
            samples = of_model(model, model.plan(steps=steps), settings.count, seed=settings.seed, name="the run")
            report, _ = evaluate(self.extractor, samples, reference, eval_config)
            values |= {f"{name}_{_steps(steps, '_')}": value for name, value in report.values.items()}
            words.append(f"{format_values(report.values)} in {_steps(steps)}")
        return values, "; ".join(words)


def make_evaluator(
    settings: PeriodicEvaluation, config: ModelConfig, dataset: Dataset, parallelism: Parallelism
) -> Evaluator:
    """dataset: the training images. parallelism: of the training step.

    Raises InputError if the evaluation is impossible: no weights, too few images.
    """
    devices = {"parallelism": parallelism.within_process, "shared": jax.process_count() > 1}
    extractor = dataclasses.replace(load_inception(settings.inception), cache=user_cache("references"), **devices)
    eval_config = EvalConfig(settings.metrics)
    if settings.reference:
        reference = open_reference(settings.reference, eval_config.needs, config.network.image_shape)
    else:
        reference = of_dataset(dataset, "the training images")
    evaluator = Evaluator(settings, config, extractor, reference)
    for steps in evaluator.steps:
        model = Model(config, {})  # without parameters, to check the plan and the number of samples
        samples = of_model(model, model.plan(steps=steps), settings.count, name="the evaluation (--evaluation.count)")
        check(extractor, samples, reference, eval_config)
    return evaluator


class EvaluationHook:
    """Evaluations of the run in `folder`, resumed after `done` batches; without an evaluator none is ever due.

    An evaluation is due until its row is written. So one that a killed run did not finish is repeated on resuming, and
    none is made twice. Each of several processes samples and evaluates a share of the images; process 0 writes.

    Raises InputError if the evaluations in the folder were made with other settings.
    """

    def __init__(self, config: TrainConfig, evaluator: Evaluator | None, folder: RunFolder, done: int) -> None:
        self._config, self._evaluator, self._folder = config, evaluator, folder
        self._reference: FeatureStatistics | None = None
        self._last, self._best = 0, math.inf
        self._periods = 0
        """Multiples of `every` in the images of the last evaluation, whose batches may have had another size."""
        if evaluator is not None:
            with raised_in_all():
                self._read(evaluator, done)
            self._last, self._periods = from_first(self._last), from_first(self._periods)

    def start(self) -> None:
        """Compute the statistics of the reference, so that its errors are found before training."""
        if self._evaluator is not None:
            self._reference = self._evaluator.reference_statistics()

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` batches."""
        if self._evaluator is None or done <= self._last:
            return False
        images = self._config.images_after(done)
        return done >= self._config.batches or images // self._evaluator.settings.every > self._periods

    def evaluate(self, done: int, params: Params, log: MetricsLog) -> str:
        """Evaluate the checkpoint after `done` batches with these parameters; a line for the user.

        The row is written last, because it marks the evaluation as complete.
        """
        evaluator, reference = self._evaluator, self._reference
        assert evaluator is not None
        assert reference is not None, "call start() first"
        values, words = evaluator.evaluate(params, reference)
        score = evaluator.score(float(f"{values[evaluator.best_column]:.9g}"))  # rounded as in the row
        best = bool(from_first(int(score < self._best)))
        if best:
            self._best = score
            self._folder.mark_best(done, values[evaluator.best_column], {"evaluation": _compared(evaluator.settings)})
        images = self._config.images_after(done)
        with raised_in_all():
            log.evaluation(done, {"images": images, **values})
        self._last, self._periods = done, images // evaluator.settings.every
        return f"Evaluated after {done:,} batches: {words}.{' The best so far.' if best else ''}"

    def _read(self, evaluator: Evaluator, done: int) -> None:
        """Read the last evaluation and the best score from the folder."""
        best, table = self._folder.path / "best.json", self._folder.path / EVALUATIONS
        before = renamed(read_json(best).get("evaluation")) if best.exists() else _compared(evaluator.settings)
        if found := serialization.differences(before, _compared(evaluator.settings)):
            raise InputError(
                f"The evaluations in {self._folder.path} were made with other settings:\n  {indented_list(found)}\n"
                f"Give the same ones, or move {EVALUATIONS} and {best.name} away."
            )
        columns, rows = read_metrics(table) if table.exists() else ([], [])
        for row in rows:
            if int(row[0]) <= done:
                values = dict(zip(columns, row, strict=True))
                score = evaluator.score(float(values.get(evaluator.best_column) or "nan"))
                self._last, self._best = int(row[0]), min(self._best, score)
                if not values.get("images", "").isdecimal():
                    raise InputError(f"{table} does not count images: move it away or repair it.")
                self._periods = int(values["images"]) // evaluator.settings.every


def _compared(settings: PeriodicEvaluation) -> dict[str, Any]:
    """Settings that must be equal in comparable evaluations."""
    encoded = serialization.encode(settings)
    return {name: value for name, value in encoded.items() if name not in PeriodicEvaluation.MAY_CHANGE}


def _steps(number: int, space: str = " ") -> str:
    return f"{number}{space}step{'s' if number > 1 else ''}"
