"""Time of a training step, ours beside PyTorch's, in one run: python -m benchmarks.step_time

On a CPU: EDM's denoising and consistency distillation in float32, PyTorch in eager mode (diffusers' UNet2DModel; for
emoji32 the network in torch_unet.py) in both memory layouts, and that network compiled, steps interleaved. On a GPU:
EDM, CD, ECT and sCM on the ImageNet-64 and CIFAR-10 networks of the presets in bfloat16 and float32, and for EDM and CD
of ImageNet-64 PyTorch in eager mode and compiled (the network in torch_unet.py), one after the other. All begin with
the same random weights. The first steps get the same noise, and on a CPU nothing is timed unless their losses agree.
Ours is the program that train.py runs, which also checks that gradients are finite and takes their norm. Every row has
a process of its own, whose peak of memory is what it adds on a CPU, what lies on a GPU. Compilation is by how much the
first step is longer than the median one.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import torch

from benchmarks.training_rows import (
    CHANNELS_LAST,
    COMPILED,
    EAGER,
    NCHW,
    OURS,
    Measured,
    Row,
    measure,
)
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.learning_rates import ConstantRate
from cm_jax.training.optimizers import RAdam
from cm_jax.types import Precision

SMALL = ADMUNet(
    image_size=32, base_channels=64, channel_mult=(1, 2, 2), blocks_per_level=1, attention_factors=(2,), classes=10
)
EMOJI = dataclasses.replace(
    PRESETS["emoji32-edm"]().network, base_channels=32, channel_mult=(1, 2, 4), blocks_per_level=1
)
"""That of the bundled model."""
METHODS = {"EDM": "edm", "CD": "cd", "ECT": "ect", "sCM": "sct"}
"""Ends of the presets' names."""


def setting(family: str, method: str, batch: int, network: ADMUNet | SongUNet | None = None) -> TrainConfig:
    """A preset with one optimizer and one average for all, and with nothing random that PyTorch could not repeat."""
    preset = PRESETS[f"{family}-{METHODS[method]}"]()
    return dataclasses.replace(
        preset,
        network=dataclasses.replace(network or preset.network, dropout=0.0, precision="float32"),
        optimizer=RAdam(ConstantRate(1e-3)),  # so that its steps show in the losses that are checked
        averages=(0.9999,),
        power_averages=(),
        batch_size=batch,
        flip=False,
        parallel="one",
    )


HEADER = """\
| network | loss | precision | batch | step | median ms | ratio | fastest ms | ratio | images/s | peak GB |\
 compile s | difference |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def lines(measured: dict[Row, Measured]) -> Iterator[str]:
    """The table's lines; ratios are to the best of PyTorch, differences are those of the losses, to ours."""
    done = {row: entry for row, entry in measured.items() if entry.seconds}
    theirs = [entry.seconds for row, entry in done.items() if row.step != OURS]
    for row, entry in measured.items():
        chosen = row.chosen
        start = f"| {row.network} | {row.method} | {chosen.network.precision} | {chosen.batch_size} | {row.step} |"
        if row not in done:
            yield f"{start} {entry.failure} | | | | | | | |"
            continue
        parts = [start]
        for take in (statistics.median, min):
            value = take(entry.seconds)
            ratio = f"{value / min(map(take, theirs)):.2f}" if theirs else ""
            parts.append(f" {1000 * value:.0f} | {ratio} |")
        median = statistics.median(entry.seconds)
        reference = next((other for row, other in done.items() if row.step == OURS), entry)
        difference = "" if entry is reference else f"{entry.difference(reference):.1e}"
        compilation = max(0.0, entry.first - median)
        parts.append(f" {chosen.batch_size / median:.1f} | {entry.peak / 1e9:.2f} | {compilation:.1f} | {difference} |")
        yield "".join(parts)


def one_by_one(rows: list[Row], repeats: int, limit: float) -> dict[Row, Measured]:
    """Each row's steps before the next row begins: only one is in memory."""
    return {row: entry for row in rows for entry in measure([row], repeats, limit).values()}


def cpu_rows(name: str, batch: int, layouts: tuple[str, ...]) -> Iterator[list[Row]]:
    """Groups of rows that are compared."""
    family = "emoji32" if name == "emoji32" else "imagenet64"
    network = {"small": SMALL, "imagenet64": ADMUNet(), "emoji32": EMOJI}[name]
    for method in ("EDM", "CD"):
        chosen = setting(family, method, batch, network)
        yield [Row(name, method, step, chosen) for step in (OURS, *layouts)]


def gpu_rows(families: list[str], methods: list[str], precisions: list[Precision], batch: int) -> Iterator[list[Row]]:
    for family in families:
        for precision in precisions:
            for method in methods:
                chosen = setting(family, method, batch or {"imagenet64": 32, "cifar10": 128}[family])
                chosen = dataclasses.replace(chosen, network=chosen.network.at_precision(precision))
                rivals = (EAGER, COMPILED) if family == "imagenet64" and method in ("EDM", "CD") else ()
                yield [Row(family, method, step, chosen) for step in (OURS, *rivals)]


def main() -> None:
    gpu = jax.devices()[0].platform == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", help="small (default), emoji32 or imagenet64 on a CPU; imagenet64,cifar10 on a GPU"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="on a GPU: with commas between")
    parser.add_argument("--precisions", default="bfloat16,float32", help="on a GPU: with commas between")
    parser.add_argument("--one-layout", action="store_true", help="on a CPU: PyTorch's channels last alone, for memory")
    parser.add_argument("--one-by-one", action="store_true", help="on a CPU: rows one after the other, for memory")
    parser.add_argument("--batch", type=int, default=0, help="images in a step; 0 is what suits the network")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 9, help="timed steps of each row")
    parser.add_argument("--limit", type=float, default=300 if gpu else 3600, help="seconds that a row may take")
    arguments = parser.parse_args()

    device = jax.devices()[0].device_kind if gpu else f"{os.cpu_count()} cores and threads"
    print(f"On {device}; jax {jax.__version__}, torch {torch.__version__}; {arguments.repeats} steps.")
    print(HEADER, flush=True)
    before = os.getloadavg()[0]
    if gpu:
        families = str(arguments.network or "imagenet64,cifar10").split(",")
        methods, precisions = arguments.methods.split(","), arguments.precisions.split(",")
        for rows in gpu_rows(families, methods, precisions, arguments.batch):
            print(*lines(one_by_one(rows, arguments.repeats, arguments.limit)), sep="\n", flush=True)
    else:
        name = arguments.network or "small"
        layouts = (CHANNELS_LAST,) if arguments.one_layout else (NCHW, CHANNELS_LAST, COMPILED)
        for rows in cpu_rows(name, arguments.batch or {"small": 16, "imagenet64": 2, "emoji32": 64}[name], layouts):
            taken = one_by_one if arguments.one_by_one else measure
            print(*lines(taken(rows, arguments.repeats, arguments.limit)), sep="\n", flush=True)
    print(f"Load average {before:.1f} before and {os.getloadavg()[0]:.1f} after; this program's own work counts in it.")


if __name__ == "__main__":
    main()
