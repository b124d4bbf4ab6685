"""Time of a training step, compared with PyTorch: python -m benchmarks.step_time

On CPU: EDM and consistency distillation (CD) in float32. PyTorch runs the UNet2DModel of diffusers in eager mode, NCHW
and channels last, and compiled (emoji32: the network of torch_unet.py). Steps alternate. On GPU: EDM, CD, ECT and sCM
with the ImageNet-64 and CIFAR-10 networks in bfloat16 and float32; for EDM and CD on ImageNet-64 also PyTorch, eager
and compiled (the network of torch_unet.py), one row after another.

All implementations start from the same random weights, and get the same noise in the first steps; on CPU the program
exits if their losses differ. The cm_jax row is the compiled step of train.py, including the gradient norm and the
check for finite gradients. Each row runs in its own process. Peak memory is the increase of the process on CPU and the
peak of the allocator on GPU. Compilation time is the first step minus the median step.
"""

import dataclasses
import os
import statistics
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import torch

from benchmarks.common import header, load_average, parser, row
from benchmarks.training_rows import (
    CHANNELS_LAST,
    CM_JAX,
    COMPILED,
    EAGER,
    NCHW,
    Measurement,
    Row,
    measure,
)
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.optimizers import ConstantRate, RAdam
from cm_jax.types import Precision

SMALL = ADMUNet(
    image_size=32, base_channels=64, channel_mult=(1, 2, 2), blocks_per_level=1, attention_factors=(2,), classes=10
)
EMOJI: Any = PRESETS["emoji32-edm"]().network
"""The network of the bundled model."""
METHODS = {"EDM": "edm", "CD": "cd", "ECT": "ect", "sCM": "sct"}
"""Suffix of the preset's name."""


def train_config(family: str, method: str, batch: int, network: ADMUNet | SongUNet | None = None) -> TrainConfig:
    """The preset with RAdam, one EMA, no dropout, no flips and no augmentation, so that PyTorch can reproduce it."""
    preset = PRESETS[f"{family}-{METHODS[method]}"]()
    chosen: Any = network or preset.network
    return dataclasses.replace(
        preset,
        network=dataclasses.replace(chosen, dropout=0.0, precision="float32"),
        optimizer=RAdam(ConstantRate(1e-3)),  # large enough to change the checked losses
        ema_decay=(0.9999,),
        power_ema=(),
        batch_size=batch,
        flip=False,
        augmentation=None,
        parallel="one",
    )


HEADER = header(
    *("Network", "Loss", "Precision", "Batch", "Implementation", "Median ms", "Ratio", "Fastest ms", "Ratio"),
    *("Images/s", "Peak GB", "Compile s", "Difference"),
)


def lines(measured: dict[Row, Measurement]) -> Iterator[str]:
    """Rows of the table. Ratios are to the fastest PyTorch row, differences to the losses of cm_jax."""
    done = {each: entry for each, entry in measured.items() if entry.seconds}
    torch_seconds = [entry.seconds for each, entry in done.items() if each.implementation != CM_JAX]
    reference = next((entry for each, entry in done.items() if each.implementation == CM_JAX), None)
    for each, entry in measured.items():
        batch = each.config.batch_size
        cells = [each.network, each.method, each.config.network.precision, batch, each.implementation]
        if each not in done:
            yield row(*cells, entry.failure, *[""] * 7)
            continue
        for take in (statistics.median, min):
            value = take(entry.seconds)
            ratio = f"{value / min(map(take, torch_seconds)):.2f}" if torch_seconds else ""
            cells += [f"{1000 * value:.0f}", ratio]
        median = statistics.median(entry.seconds)
        compilation = max(0.0, entry.first - median)
        difference = f"{entry.difference(reference):.1e}" if reference and entry is not reference else ""
        yield row(*cells, f"{batch / median:.1f}", f"{entry.peak / 1e9:.2f}", f"{compilation:.1f}", difference)


def one_by_one(rows: list[Row], repeats: int, limit: float) -> dict[Row, Measurement]:
    """Measure one row after another, so that only one is in memory."""
    return {each: entry for each in rows for entry in measure([each], repeats, limit).values()}


def cpu_rows(name: str, batch: int, layouts: tuple[str, ...]) -> Iterator[list[Row]]:
    """Groups of rows to compare."""
    family = "emoji32" if name == "emoji32" else "imagenet64"
    network = {"small": SMALL, "imagenet64": ADMUNet(), "emoji32": EMOJI}[name]
    for method in ("EDM", "CD"):
        config = train_config(family, method, batch, network)
        yield [Row(name, method, step, config) for step in (CM_JAX, *layouts)]


def gpu_rows(families: list[str], methods: list[str], precisions: list[Precision], batch: int) -> Iterator[list[Row]]:
    for family in families:
        for precision in precisions:
            for method in methods:
                config = train_config(family, method, batch or {"imagenet64": 32, "cifar10": 128}[family])
                config = dataclasses.replace(config, network=config.network.at_precision(precision))
                rivals = (EAGER, COMPILED) if family == "imagenet64" and method in ("EDM", "CD") else ()
                yield [Row(family, method, step, config) for step in (CM_JAX, *rivals)]


def main() -> None:
    gpu = jax.devices()[0].platform == "gpu"
    options = parser(__doc__)
    options.add_argument(
        "--network",
        help="CPU: small (default), emoji32 or imagenet64. GPU: imagenet64,cifar10 (default) or one of them.",
    )
    options.add_argument("--methods", default=",".join(METHODS), help="Methods on GPU, comma-separated.")
    options.add_argument("--precisions", default="bfloat16,float32", help="Precisions on GPU, comma-separated.")
    options.add_argument(
        "--one-layout", action="store_true", help="On CPU, run PyTorch only in channels last, to save memory."
    )
    options.add_argument("--one-by-one", action="store_true", help="On CPU, run one row after another, to save memory.")
    options.add_argument("--batch", type=int, default=0, help="Batch size; 0 selects a default for the network.")
    options.add_argument("--repeats", type=int, default=20 if gpu else 9, help="Number of timed steps per row.")
    options.add_argument("--limit", type=float, default=300 if gpu else 3600, help="Time limit of a row in seconds.")
    args = options.parse_args()

    device = jax.devices()[0].device_kind if gpu else f"{os.cpu_count()} cores and threads"
    print(f"On {device}; jax {jax.__version__}, torch {torch.__version__}; {args.repeats} steps.")
    print(HEADER, flush=True)
    before = os.getloadavg()[0]
    if gpu:
        families = str(args.network or "imagenet64,cifar10").split(",")
        for rows in gpu_rows(families, args.methods.split(","), args.precisions.split(","), args.batch):
            print(*lines(one_by_one(rows, args.repeats, args.limit)), sep="\n", flush=True)
    else:
        name = args.network or "small"
        layouts = (CHANNELS_LAST,) if args.one_layout else (NCHW, CHANNELS_LAST, COMPILED)
        for rows in cpu_rows(name, args.batch or {"small": 16, "imagenet64": 2, "emoji32": 64}[name], layouts):
            run = one_by_one if args.one_by_one else measure
            print(*lines(run(rows, args.repeats, args.limit)), sep="\n", flush=True)
    print(load_average(before))


if __name__ == "__main__":
    main()
