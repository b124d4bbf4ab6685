"""All training methods with the same budget on the emoji data, with small networks:

    python -m benchmarks.methods train --images 200000     # needs the run of the teacher, see --teacher
    python -m benchmarks.methods measure --count 1000 --picture methods.png --curves methods_curves.png
    python -m benchmarks.methods measure --methods old.safetensors,emoji32 --count 500    # checkpoints instead of runs

The distilled methods, ECT and sCT are initialized from the teacher, the others at random. Settings are those of
the presets except: the teacher's network with at most its dropout, the batch size, an EMA over 10 % of the run,
curricula and warm-ups scaled to the number of steps, and learning rates scaled by --lr-scale. LPIPS compares images at
their own size, not at 224 pixels as in the papers, which would be 49 times as many pixels at 32x32.

`train` resumes interrupted runs and skips finished ones. The student of runs/NAME-edm is runs/NAME-METHOD. `measure`
prints FID, KID, precision and recall in one and two steps, against the training split and the held-out split. With
--num-evaluations, training also records one-step FID and KID.
"""

import argparse
import csv
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import header, parser, row
from benchmarks.methods_plot import plot_curves
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import EmojiData
from cm_jax.diffusion.curricula import StepSchedule
from cm_jax.diffusion.losses import PseudoHuber
from cm_jax.errors import InputError
from cm_jax.evaluation import (
    EvalConfig,
    FeatureExtractor,
    FeatureStatistics,
    ImageSet,
    compare,
    load_inception,
    of_dataset,
    of_model,
    summarize,
)
from cm_jax.evaluation.features import reference_statistics
from cm_jax.feature_networks.lpips import LPIPS
from cm_jax.io.atomic import user_cache
from cm_jax.io.images import grid, quantize
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.presets import PRESETS
from cm_jax.training.config import PeriodicEvaluation, TrainConfig
from cm_jax.training.loop import train

replace = dataclasses.replace

METHODS = ("cd", "cd-lpips", "cd-huber", "ect", "scd", "sct", "ct", "ict", "meanflow")
TEACHER_STEPS = 18
TWO_STEPS = (80.0, 0.8)
"""Noise levels of two-step sampling without tuned timesteps: those of iCT and ECT at 32x32."""
EVAL_CONFIG = EvalConfig(("fid", "kid", "pr"))
REFERENCES = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Training budget of every student."""

    images: int
    batch_size: int
    lr_scale: float
    """Factor of the learning rate of the preset."""
    num_evaluations: int
    """Number of evaluations during training; 0 disables them."""
    eval_count: int
    """Number of images per evaluation."""

    @property
    def batches(self) -> int:
        return -(-self.images // self.batch_size)


def train_config(method: str, teacher: Path, budget: Budget, network: Any) -> TrainConfig:
    """The preset of a method with the network of the teacher, scaled to the budget."""
    name, _, distance = method.partition("-")
    preset = PRESETS[f"emoji32-{name}"]()
    usual: Any = preset.network
    fields = {field: getattr(usual, field) for field in ("attention", "interval_embedding")}
    chosen = scale_steps(preset, budget.batches / preset.batches)
    rate = chosen.optimizer.learning_rate
    if distance:
        objective: Any = chosen.objective
        chosen = replace(
            chosen, objective=replace(objective, distance={"lpips": LPIPS(size=0), "huber": PseudoHuber()}[distance])
        )
    evaluation = PeriodicEvaluation(
        every=budget.images // max(1, budget.num_evaluations),
        count=budget.eval_count,
        steps=(1,),
        metrics=("fid", "kid"),
    )
    return replace(
        chosen,
        network=replace(network, **fields, dropout=min(network.dropout, usual.dropout)),
        optimizer=replace(chosen.optimizer, learning_rate=replace(rate, peak=budget.lr_scale * rate.peak)),
        teacher=str(teacher) if preset.teacher else "",
        init_from=str(teacher) if preset.init_from else "",
        batch_size=budget.batch_size,
        images=budget.images,
        ema_decay=(round(1 - 10 / max(20, budget.batches), 4),),
        power_ema=(),
        evaluation=evaluation if budget.num_evaluations else None,
    )


def scale_steps(component: Any, factor: float) -> Any:
    """Multiply every duration in steps of a config by `factor`."""
    changes: dict[str, Any] = {}
    scheduled = isinstance(component, StepSchedule)
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = scale_steps(value, factor)
        elif field.name == "warm_up" or (scheduled and field.name in ("steps", "steps_per_stage")):
            changes[field.name] = max(min(1, value), int(value * factor))
    return replace(component, **changes)


def sampling_plans(model: Model) -> dict[str, dict[str, Any]]:
    """Arguments of `Model.sample` by name: one and two steps for a student, Heun for the teacher."""
    if not model.config.distilled:
        return {f"{TEACHER_STEPS} steps of Heun": {"steps": TEACHER_STEPS}}
    tuned = any(len(steps) == 2 for steps in model.config.tuned_timesteps)
    plan: dict[str, Any] = {"steps": 2} if tuned else {"sigmas": TWO_STEPS}
    return {"1 step": {"steps": 1}, f"2 steps, sigma {model.plan(**plan).levels[1]:.2g}": plan}


Scores = dict[str, dict[str, float]]
"""Metrics by name, for each split of the emoji data."""


def scores(extractor: FeatureExtractor, samples: ImageSet) -> Scores:
    """Metrics of the samples against every split; each image is sampled once."""
    statistics = summarize(extractor, samples.batches(), EVAL_CONFIG.needs)
    return {
        split: compare(statistics, _reference(extractor, split, samples.shape[0]), EVAL_CONFIG) for split in REFERENCES
    }


@functools.cache
def _reference(extractor: FeatureExtractor, split: Any, size: int) -> FeatureStatistics:
    real = of_dataset(EmojiData(split).open(size), f"emoji:{split}")
    return reference_statistics(extractor, real, EVAL_CONFIG.needs)


def evaluate_run(extractor: FeatureExtractor, folder: Path, count: int) -> dict[str, Any]:
    """Scores of a run for every sampling plan, cached in its scores.json until the run is trained further."""
    cache = folder / "scores.json"
    seen, minutes = training_time(folder)
    cached = json.loads(cache.read_text("utf-8")) if cache.exists() else {}
    same = (cached.get("images"), cached.get("count")) == (seen, count)
    result = {"images": seen, "minutes": minutes, "count": count, "plans": {}}
    for name, found in evaluate(extractor, load(folder), count, cached.get("plans", {}) if same else {}):
        result["plans"][name] = found
        cache.write_text(json.dumps(result, indent=2), "utf-8")
    return result


def evaluate(
    extractor: FeatureExtractor, model: Model, count: int, known: dict[str, Scores]
) -> Iterator[tuple[str, Scores]]:
    """Every sampling plan with its scores, computed where they are not known."""
    for name, plan in sampling_plans(model).items():
        samples = of_model(model, model.plan(**plan), count, seed=0, name="samples")
        yield name, known.get(name) or scores(extractor, samples)


def training_time(folder: Path) -> tuple[int, float]:
    """(training images, minutes of training without compilation, sample grids and interruptions)."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    seen = [0.0, *(row["images"] for row in rows)]
    rates = [row.get("images_per_second", np.nan) for row in rows]
    return int(seen[-1]), float(np.nansum(np.diff(seen) / rates) / 60)


HEADER = header(
    *("Run", "Images", "Minutes", "Sampling", "FID", "KID", "Precision", "Recall", "FID, held out", "KID, held out")
)


def lines(name: str, result: dict[str, Any]) -> Iterator[str]:
    training = (f"{result['images']:,}", f"{result['minutes']:.0f}") if "images" in result else ("", "")
    for plan, found in result["plans"].items():
        cells = (name, *training, plan)
        yield row(*cells, *_all_metrics(found["train"]), *_fid_kid(found["held_out"]))


def _all_metrics(values: dict[str, float]) -> tuple[str, ...]:
    return (*_fid_kid(values), f"{values['precision']:.2f}", f"{values['recall']:.2f}")


def _fid_kid(values: dict[str, float]) -> tuple[str, str]:
    return f"{values['fid']:.1f}", f"{values['kid']:.4f}"


def reference_rows(extractor: FeatureExtractor, shape: tuple[int, int, int], count: int) -> Iterator[str]:
    """Rows of the best and worst expected scores: held-out images and noise, against the training split."""
    real = of_dataset(EmojiData("held_out").open(shape[0]), "emoji:held_out")
    statistics = summarize(extractor, real.batches(), EVAL_CONFIG.needs)
    best = compare(statistics, _reference(extractor, "train", shape[0]), EVAL_CONFIG)
    yield row(f"{real.count} held-out images", "", "", "", *_all_metrics(best), "", "")
    found = scores(extractor, noise(shape, count))
    yield row("noise", "", "", "", *_all_metrics(found["train"]), *_fid_kid(found["held_out"]))


def noise(shape: tuple[int, int, int], count: int) -> ImageSet:
    """Standard normal pixels, clipped to the range of images."""

    def read(first: int, last: int) -> Iterator[np.ndarray]:
        assert not first, "only as a whole"
        rng = np.random.default_rng(0)
        for start in range(0, last, 64):
            yield quantize(rng.standard_normal((min(64, last - start), *shape)).astype(np.float32))

    return ImageSet("noise", count, shape, read)


def picture(models: dict[str, Model]) -> Image.Image:
    """Image grid with a row for each run and sampling plan, a column for each class, from the same noise."""
    rows, names = [], []
    for name, model in models.items():
        classes = range(model.config.network.classes or 1)
        for plan, arguments in sampling_plans(model).items():
            rows.append(quantize(model.sample(0, len(classes), labels=classes, **arguments)))
            names.append(f"{name}, {plan}")
    return grid(np.concatenate(rows), len(rows[0]), names)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("action", choices=("train", "measure"))
    options.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the runs.")
    options.add_argument("--teacher", type=Path, default=Path("runs/emoji32-edm"), help="Run folder of the teacher.")
    options.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="Methods, comma-separated; `measure` also accepts other runs, and checkpoints by file or id.",
    )
    options.add_argument("--images", type=int, default=200_000, help="Number of training images per student.")
    options.add_argument("--batch-size", type=int, default=32, help="Training batch size.")
    options.add_argument("--lr-scale", type=float, default=1.0, help="Factor of the learning rates of the presets.")
    options.add_argument(
        "--num-evaluations", type=int, default=0, help="Number of evaluations during training; need CM_JAX_INCEPTION."
    )
    options.add_argument("--eval-count", type=int, default=250, help="Number of images per evaluation.")
    options.add_argument("--count", type=int, default=1000, help="Number of images sampled by `measure`.")
    options.add_argument("--picture", type=Path, help="PNG of samples of all runs from the same noise.")
    options.add_argument("--curves", type=Path, help="PNG of the evaluations during training.")
    args = options.parse_args()
    methods = args.methods.split(",")
    if args.action == "train" and (unknown := set(methods) - set(METHODS)):
        options.error(f"Unknown methods: {', '.join(sorted(unknown))}. Choose from {', '.join(METHODS)}.")
    family = args.teacher.resolve().name.removesuffix("-edm")
    folders = {method: args.runs / f"{family}-{method}" for method in methods}

    try:
        if args.action == "train":
            network = load(args.teacher).config.network
            budget = Budget(args.images, args.batch_size, args.lr_scale, args.num_evaluations, args.eval_count)
            for method, folder in folders.items():
                print(f"\n{method}", flush=True)
                train(train_config(method, args.teacher, budget, network), folder)
            return
        measure(args.teacher, folders, args)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


def measure(teacher: Path, folders: dict[str, Path], args: argparse.Namespace) -> None:
    """Print the table of scores; write the pictures."""
    runs = {name: path for name, path in {"teacher": teacher, **folders}.items() if path.exists()}
    checkpoints = [name for name in folders if name not in runs and name not in METHODS]
    extractor = dataclasses.replace(load_inception(), cache=user_cache("references"))
    models = {name: load(path) for name, path in runs.items()} | {name: load(name) for name in checkpoints}
    if not models:
        raise InputError(f"Found no runs of {args.methods} in {args.runs}: see --runs and --methods.")
    if args.curves and "teacher" not in runs:
        raise InputError(f"--curves also shows the teacher, but {teacher} does not exist: see --teacher.")
    config: ModelConfig = next(iter(models.values())).config
    print(f"{args.count} images per run, seed 0.")
    print(HEADER, flush=True)
    print(*reference_rows(extractor, config.network.image_shape, args.count), sep="\n", flush=True)
    results = {}
    for name, model in models.items():
        run = runs.get(name)
        if run:
            results[name] = evaluate_run(extractor, run, args.count)
        else:
            results[name] = {"plans": dict(evaluate(extractor, model, args.count, {}))}
        print(*lines(name, results[name]), sep="\n", flush=True)
    if args.curves:
        (scores_of_teacher,) = results["teacher"]["plans"].values()
        plot_curves(runs, scores_of_teacher["train"], args.curves)
    if args.picture:
        picture(models).save(args.picture)


if __name__ == "__main__":
    main()
