"""Every method under the same budget, on the bundled emoji, with small networks:

    python -m benchmarks.methods train --images 200000          # the teacher must be there: --teacher runs/emoji32-edm
    python -m benchmarks.methods measure --count 1000 --picture methods.png --curves methods_curves.png

Students that distil begin with the teacher's weights, as do ECT and sCT; the others begin with nothing. The settings
are the presets' but for the network (the teacher's, with no more dropout than it had), the batch, the averages (of a
tenth of the run), curricula and warm-ups (laid out for the run's own steps), and --rate, by which all learning rates
are multiplied. Runs go on where they were stopped, and what is finished is not done again. Measured are FID, KID,
precision and recall in one step and in two, against the images that all learned from and against those that none saw;
with --evaluations also one-step FID and KID in training. LPIPS looks at the images' own size: at 224 pixels, as in the
papers, there are 49 times as many as at 32. Students of runs/NAME-edm are NAME-METHOD.
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

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import EmojiData
from cm_jax.diffusion.distances import PseudoHuber
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
from cm_jax.evaluation.references import default_cache, summarised
from cm_jax.feature_networks.lpips import LPIPS
from cm_jax.io.images import grid, quantize
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.run.evaluation_hook import PeriodicEvaluation
from cm_jax.training.run.metrics_log import EVALUATIONS, read_metrics

replace = dataclasses.replace

METHODS = ("cd", "cd-lpips", "cd-huber", "ect", "scd", "sct", "ct", "ict", "meanflow")
TEACHER_STEPS = 18
TWO_STEPS = (80.0, 0.8)
"""Levels of two steps where none were tuned (`cm-jax tune`): those of iCT and ECT at 32 pixels."""
PROTOCOL = EvalConfig(("fid", "kid", "pr"))
REFERENCES = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every student is given."""

    images: int
    batch_size: int
    rate: float
    """Times the preset's learning rate."""
    evaluations: int
    """Points of a curve; 0 for none."""
    evaluated: int
    """Images drawn for a point."""

    @property
    def batches(self) -> int:
        return -(-self.images // self.batch_size)


def settings(method: str, teacher: Path, budget: Budget, network: Any) -> TrainConfig:
    """The preset of a method, with the teacher's network, and all that counts steps laid out for the budget's."""
    name, _, distance = method.partition("-")
    preset = PRESETS[f"emoji32-{name}"]()
    own = {field: getattr(preset.network, field) for field in ("attention", "interval_embedding")}
    chosen = laid_out(preset, budget.batches / preset.batches)
    rate = chosen.optimizer.learning_rate
    if distance:
        objective: Any = chosen.objective
        chosen = replace(
            chosen, objective=replace(objective, distance={"lpips": LPIPS(size=0), "huber": PseudoHuber()}[distance])
        )
    evaluation = PeriodicEvaluation(
        every=budget.images // max(1, budget.evaluations), count=budget.evaluated, steps=(1,), metrics=("fid", "kid")
    )
    return replace(
        chosen,
        network=replace(network, **own, dropout=min(network.dropout, preset.network.dropout)),
        optimizer=replace(chosen.optimizer, learning_rate=replace(rate, peak=budget.rate * rate.peak)),
        teacher=str(teacher) if preset.teacher else "",
        start=str(teacher) if preset.start else "",
        batch_size=budget.batch_size,
        images=budget.images,
        averages=(round(1 - 10 / max(20, budget.batches), 4),),
        power_averages=(),
        evaluation=evaluation if budget.evaluations else None,
    )


def laid_out(part: Any, factor: float) -> Any:
    """The same settings with everything that lasts a number of steps made longer by a factor."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = laid_out(value, factor)
        elif field.name == "warm_up" or (hasattr(part, "lasts") and field.name in ("steps", "steps_per_stage")):
            changes[field.name] = max(min(1, value), int(value * factor))
    return replace(part, **changes)


def levels(model: Model) -> dict[str, dict[str, Any]]:
    """The ways in which a model is drawn from, by name."""
    if not model.config.distilled:
        return {f"{TEACHER_STEPS} steps of Heun": {"steps": TEACHER_STEPS}}
    tuned = any(len(steps) == 2 for steps in model.config.tuned_timesteps)
    plan: dict[str, Any] = {"steps": 2} if tuned else {"sigmas": TWO_STEPS}
    return {"1 step": {"steps": 1}, f"2 steps, sigma {model.plan(**plan).levels[1]:.2g}": plan}


Scores = dict[str, dict[str, float]]
"""Of a set of images: the metrics by name, against every split of the emoji."""


def scores(extractor: FeatureExtractor, samples: ImageSet) -> Scores:
    """Every image is drawn and seen once."""
    seen = summarize(extractor, samples.batches(), PROTOCOL.needs)
    return {split: compare(seen, _known(extractor, split, samples.shape[0]), PROTOCOL) for split in REFERENCES}


@functools.cache
def _known(extractor: FeatureExtractor, split: Any, size: int) -> FeatureStatistics:
    real = of_dataset(EmojiData(split).open(size), f"emoji:{split}")
    return summarised(extractor, real, PROTOCOL.reference_needs, cache=default_cache())


def measured(extractor: FeatureExtractor, folder: Path, count: int) -> dict[str, Any]:
    """Scores of a run in every way, kept beside it until it goes on."""
    model, kept = load(folder), folder / "scores.json"
    seen, minutes = spent(folder)
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    ways = known["ways"] if (known.get("images"), known.get("count")) == (seen, count) else {}
    result = {"images": seen, "minutes": minutes, "count": count, "ways": {}}
    for way, plan in levels(model).items():
        result["ways"][way] = ways.get(way) or scores(
            extractor, of_model(model, model.plan(**plan), count, seed=0, name=folder.name)
        )
        kept.write_text(json.dumps(result, indent=2), "utf-8")
    return result


def spent(folder: Path) -> tuple[int, float]:
    """(images seen, minutes that they took, without compilation, samples and stops)."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    seen = [0.0, *(row["images"] for row in rows)]
    rates = [row.get("images_per_second", np.nan) for row in rows]
    return int(seen[-1]), float(np.nansum(np.diff(seen) / rates) / 60)


HEADER = """\
| run | images | minutes | drawn in | FID | KID | precision | recall | held out: FID | KID |
|---|---|---|---|---|---|---|---|---|---|"""


def lines(name: str, result: dict[str, Any]) -> Iterator[str]:
    for way, found in result["ways"].items():
        parts = (name, f"{result['images']:,}", f"{result['minutes']:.0f}", way)
        yield f"| {' | '.join(parts)} | {_four(found['train'])} | {_two(found['held_out'])} |"


def _four(values: dict[str, float]) -> str:
    return f"{_two(values)} | {values['precision']:.2f} | {values['recall']:.2f}"


def _two(values: dict[str, float]) -> str:
    return f"{values['fid']:.1f} | {values['kid']:.4f}"


def bounds(extractor: FeatureExtractor, shape: tuple[int, int, int], count: int) -> Iterator[str]:
    """Between which the models lie: real images that they did not see, against those that they did; and noise."""
    real = of_dataset(EmojiData("held_out").open(shape[0]), "emoji:held_out")
    seen = summarize(extractor, real.batches(), PROTOCOL.needs)
    floor = compare(seen, _known(extractor, "train", shape[0]), PROTOCOL)
    yield f"| {real.count} held-out images, to the train split | | | | {_four(floor)} | | |"
    found = scores(extractor, noise(shape, count))
    yield f"| noise | | | | {_four(found['train'])} | {_two(found['held_out'])} |"


def noise(shape: tuple[int, int, int], count: int) -> ImageSet:
    """Standard normal pixels, clipped as images are."""

    def batches() -> Iterator[np.ndarray]:
        dice = np.random.default_rng(0)
        for start in range(0, count, 64):
            yield quantize(dice.standard_normal((min(64, count - start), *shape)).astype(np.float32))

    return ImageSet("noise", count, shape, batches)


def picture(models: dict[str, Model]) -> Image.Image:
    """A row for every way of every run, a column for every class, from the same noise."""
    rows, names = [], []
    for name, model in models.items():
        classes = range(model.config.network.classes or 1)
        for way, plan in levels(model).items():
            rows.append(quantize(model.sample(0, len(classes), labels=classes, **plan)))
            names.append(f"{name}, {way}")
    return grid(np.concatenate(rows), len(rows[0]), names)


def curves(folders: dict[str, Path], teacher: dict[str, float], file: Path) -> None:
    """One-step FID and KID against images seen, a line for every run that was evaluated; the teacher's are level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("fid", "kid"), strict=True):
        for number, (name, folder) in enumerate(folders.items()):
            if (folder / EVALUATIONS).exists():
                columns, rows = read_metrics(folder / EVALUATIONS)
                images, values = (
                    [float(row[columns.index(column)]) for row in rows] for column in ("images", f"{metric}_1_step")
                )
                axes.plot(images, values, marker="osD^v<>Px"[number % 9], markersize=5, label=name)
        axes.axhline(teacher[metric], color="black", linestyle="--", linewidth=1, label="teacher")
        axes.set(title=f"{metric.upper()} in one step", xlabel="images seen", yscale="log")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the students' runs")
    parser.add_argument("--rate", type=float, default=1.0, help="times the presets' learning rates")
    parser.add_argument(
        "--evaluations", type=int, default=0, help="in training, of one step; they need CM_JAX_INCEPTION"
    )
    parser.add_argument("--evaluated", type=int, default=250, help="images drawn for an evaluation")
    parser.add_argument("--teacher", type=Path, default=Path("runs/emoji32-edm"))
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="with commas between; for measure, names of other students too"
    )
    parser.add_argument("--images", type=int, default=200_000, help="that every student sees")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--count", type=int, default=1000, help="images drawn for a measurement")
    parser.add_argument("--picture", type=Path, help="PNG of all runs from the same noise")
    parser.add_argument("--curves", type=Path, help="PNG of the evaluations in training")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if arguments.what == "train" and (unknown := set(methods) - set(METHODS)):
        raise SystemExit(f"There is no method {', '.join(unknown)}: {', '.join(METHODS)}.")
    family = arguments.teacher.resolve().name.removesuffix("-edm")
    folders = {method: arguments.runs / f"{family}-{method}" for method in methods}

    try:
        if arguments.what == "train":
            network = load(arguments.teacher).config.network
            budget = Budget(
                arguments.images, arguments.batch_size, arguments.rate, arguments.evaluations, arguments.evaluated
            )
            for method, folder in folders.items():
                print(f"\n{method}", flush=True)
                train(settings(method, arguments.teacher, budget, network), folder)
            return
        extractor = load_inception()
        found = {"teacher": arguments.teacher} | {name: path for name, path in folders.items() if path.exists()}
        if missing := [name for name in methods if name not in found and name not in METHODS]:
            raise InputError(f"There is no run {', '.join(str(folders[name]) for name in missing)}.")
        models = {name: load(path) for name, path in found.items()}
        config: ModelConfig = models["teacher"].config
        print(f"{arguments.count} images of each, seed 0.")
        print(HEADER, flush=True)
        print(*bounds(extractor, config.network.image_shape, arguments.count), sep="\n", flush=True)
        results = {}
        for name, path in found.items():
            results[name] = measured(extractor, path, arguments.count)
            print(*lines(name, results[name]), sep="\n", flush=True)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    if arguments.curves:
        (way,) = results["teacher"]["ways"].values()
        curves(found, way["train"], arguments.curves)
    if arguments.picture:
        picture(models).save(arguments.picture)


if __name__ == "__main__":
    main()
