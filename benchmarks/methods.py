"""Every method under the same budget, on the bundled emoji, with small networks:

    python -m benchmarks.methods train --images 200000          # the teacher must be there: --teacher runs/emoji32-edm
    python -m benchmarks.methods measure --count 1000 --picture docs/images/methods.png

Students that distil begin with the teacher's weights; the others begin with nothing. The settings are the presets' but
for the network, which is the teacher's, the batch, and the curricula, which are laid out for the run's own steps. Runs
go on where they were stopped, and what is finished is not done again. Measured are FID, KID, precision and recall in
one step and in two against the images that all learned from, and against those that none saw. LPIPS looks at 32 pixels:
at 224, as in the papers, there are 49 times as many.
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

from cm_jax.config import ModelConfig
from cm_jax.data import EmojiData
from cm_jax.distances import PseudoHuber
from cm_jax.errors import InputError
from cm_jax.evaluation import (
    ImageSet,
    Judge,
    Protocol,
    Summary,
    compare,
    load_inception,
    of_dataset,
    of_model,
    summarise,
)
from cm_jax.evaluation.references import default_cache, summarised
from cm_jax.images import grid, quantise
from cm_jax.model import Model, load
from cm_jax.perceptual import LPIPS
from cm_jax.presets import PRESETS
from cm_jax.training.loop import train
from cm_jax.training.training import Training

replace = dataclasses.replace

METHODS = ("cd", "cd-lpips", "cd-huber", "ect", "scd", "sct", "ct", "ict", "meanflow")
TEACHER_STEPS = 18
TWO_STEPS = (80.0, 0.8)
"""Levels of two steps where none were tuned (`cm-jax tune`): those of iCT and ECT at 32 pixels."""
PROTOCOL = Protocol(("fid", "kid", "pr"))
REFERENCES = ("train", "held_out")


def settings(method: str, teacher: Path, images: int, batch_size: int, network: Any) -> Training:
    """The preset of a method, with the teacher's network and its curricula laid out for so many images."""
    name, _, distance = method.partition("-")
    preset = PRESETS[f"emoji32-{name}"]()
    own = ("dropout", "attention", "interval_clock")
    chosen = laid_out(preset, -(-images // batch_size) / preset.batches)
    if distance:
        objective: Any = chosen.objective
        chosen = replace(
            chosen, objective=replace(objective, distance={"lpips": LPIPS(size=0), "huber": PseudoHuber()}[distance])
        )
    return replace(
        chosen,
        network=replace(network, **{field: getattr(preset.network, field) for field in own}),
        teacher=str(teacher) if preset.teacher else "",
        start=str(teacher) if preset.start else "",
        batch_size=batch_size,
        images=images,
        averages=(0.999,),
        power_averages=(),
    )


def laid_out(part: Any, factor: float) -> Any:
    """The same settings with everything that lasts a number of steps made longer by a factor."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = laid_out(value, factor)
        elif hasattr(part, "lasts") and field.name in ("steps", "steps_per_stage"):
            changes[field.name] = max(1, int(value * factor))
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


def scores(judge: Judge, samples: ImageSet) -> Scores:
    """Every image is drawn and seen once."""
    seen = summarise(judge, samples.batches(), PROTOCOL.needs)
    return {split: compare(seen, _known(judge, split, samples.shape[0]), PROTOCOL) for split in REFERENCES}


@functools.cache
def _known(judge: Judge, split: Any, size: int) -> Summary:
    real = of_dataset(EmojiData(split).open(size), f"emoji:{split}")
    return summarised(judge, real, PROTOCOL.reference_needs, cache=default_cache())


def measured(judge: Judge, folder: Path, count: int) -> dict[str, Any]:
    """Scores of a run in every way, kept beside it until it goes on."""
    model, kept = load(folder), folder / "scores.json"
    seen, minutes = budget(folder)
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    ways = known["ways"] if (known.get("images"), known.get("count")) == (seen, count) else {}
    result = {"images": seen, "minutes": minutes, "count": count, "ways": {}}
    for way, plan in levels(model).items():
        result["ways"][way] = ways.get(way) or scores(
            judge, of_model(model, model.plan(**plan), count, seed=0, name=folder.name)
        )
        kept.write_text(json.dumps(result, indent=2), "utf-8")
    return result


def budget(folder: Path) -> tuple[int, float]:
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


def bounds(judge: Judge, shape: tuple[int, int, int], count: int) -> Iterator[str]:
    """Between which the models lie: real images that they did not see, against those that they did; and noise."""
    real = of_dataset(EmojiData("held_out").open(shape[0]), "emoji:held_out")
    seen = summarise(judge, real.batches(), PROTOCOL.needs)
    floor = compare(seen, _known(judge, "train", shape[0]), PROTOCOL)
    yield f"| {real.count} held-out images, to the train split | | | | {_four(floor)} | | |"
    found = scores(judge, noise(shape, count))
    yield f"| noise | | | | {_four(found['train'])} | {_two(found['held_out'])} |"


def noise(shape: tuple[int, int, int], count: int) -> ImageSet:
    """Standard normal pixels, clipped as images are."""

    def batches() -> Iterator[np.ndarray]:
        dice = np.random.default_rng(0)
        for start in range(0, count, 64):
            yield quantise(dice.standard_normal((min(64, count - start), *shape)).astype(np.float32))

    return ImageSet("noise", count, shape, batches)


def picture(models: dict[str, Model]) -> Image.Image:
    """A row for every way of every run, a column for every class, from the same noise."""
    rows, names = [], []
    for name, model in models.items():
        classes = range(model.config.network.classes or 1)
        for way, plan in levels(model).items():
            rows.append(quantise(model.sample(0, len(classes), labels=classes, **plan)))
            names.append(f"{name}, {way}")
    return grid(np.concatenate(rows), len(rows[0]), names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the students' runs")
    parser.add_argument("--teacher", type=Path, default=Path("runs/emoji32-edm"))
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between")
    parser.add_argument("--images", type=int, default=200_000, help="that every student sees")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--count", type=int, default=1000, help="images drawn for a measurement")
    parser.add_argument("--picture", type=Path, help="PNG of all runs from the same noise")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"There is no method {', '.join(unknown)}: {', '.join(METHODS)}.")
    folders = {method: arguments.runs / f"emoji32-{method}" for method in methods}

    try:
        if arguments.what == "train":
            network = load(arguments.teacher).config.network
            for method, folder in folders.items():
                print(f"\n{method}", flush=True)
                train(settings(method, arguments.teacher, arguments.images, arguments.batch_size, network), folder)
            return
        judge = load_inception()
        found = {"teacher": arguments.teacher} | {name: path for name, path in folders.items() if path.exists()}
        models = {name: load(path) for name, path in found.items()}
        config: ModelConfig = models["teacher"].config
        print(f"{arguments.count} images of each, seed 0.")
        print(HEADER, flush=True)
        print(*bounds(judge, config.network.image_shape, arguments.count), sep="\n", flush=True)
        for name, path in found.items():
            print(*lines(name, measured(judge, path, arguments.count)), sep="\n", flush=True)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    if arguments.picture:
        picture(models).save(arguments.picture)


if __name__ == "__main__":
    main()
