"""The parts of `benchmarks.gpu`, which starts each in its own process: python -m benchmarks.gpu_parts PARTS FOLDER

A part prints each result at once, and appends it to FOLDER/PART.json, one JSON object per line. Networks are those of
the presets in bfloat16, or tiny ones with --small.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import torch

from benchmarks import training_rows
from benchmarks.common import ROOT, parser
from benchmarks.gpu_sampling import sampling, sampling_compiled
from benchmarks.gpu_task import Task, save_profile
from benchmarks.profiles import Ceilings
from benchmarks.random_params import random_params
from benchmarks.step_time import HEADER, lines, train_config
from benchmarks.training_rows import CM_JAX, COMPILED, EAGER, JaxStep, Measurement, Row, build_step
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.model import Model
from cm_jax.networks.adm_unet import IMAGENET64
from cm_jax.presets import PRESETS

METHODS = {"edm": "EDM", "cd": "CD", "ect": "ECT", "sct": "sCM"}
"""Methods of the parts that are training steps."""


def median_seconds(run: Callable[[], Any], rounds: int, times: int) -> float:
    """Median time of a call, over `rounds` rounds of `times` asynchronous calls."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(times)][-1])
        seconds.append((time.perf_counter() - began) / times)
    return statistics.median(seconds)


def ceilings(task: Task) -> None:
    """Operations per second of a large bfloat16 matrix product; bytes per second, read and written, of a large copy."""
    rounds, times = (2, 2) if task.small else (5, 20)
    fastest = 0.0
    for size in (256,) if task.small else (8192, 16384):
        left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
        product = jax.jit(jnp.dot)
        rate = 2 * size**3 / median_seconds(functools.partial(product, left, right), rounds, times)
        print(f"Product of {size}^2 by {size}^2, bfloat16: {rate / 1e12:.4g} TFLOP/s.", flush=True)
        fastest = max(fastest, rate)
    numbers = jax.random.normal(jax.random.key(0), (2**20 if task.small else 2**29,))
    bandwidth = max(
        2 * numbers.nbytes / median_seconds(functools.partial(jax.jit(function), numbers), rounds, times)
        for function in (jnp.copy, lambda x: x + 1)
    )
    print(f"Copy of {numbers.nbytes / 1e9:.3g} GB: {bandwidth / 1e12:.4g} TB/s, read and written.", flush=True)
    task.record({"operations": fastest, "bytes": bandwidth})


def training_step(part: str, rivals: tuple[str, ...], task: Task) -> None:
    """Time of a training step at the largest batch size that fits, compared with PyTorch."""
    family = "imagenet64" if part in ("edm", "cd") else "cifar10"
    usual: Any = PRESETS[f"{family}-{part}"]().network
    network: Any = task.network(usual)
    batches = (2,) if task.small else {"imagenet64": (32, 16), "cifar10": (256, 128)}[family]
    print(HEADER, flush=True)
    done: dict[Row, Measurement] = {}

    def measure(name: str, batch: int) -> tuple[Row, Measurement]:
        config = dataclasses.replace(train_config(family, METHODS[part], batch, network), network=network)
        row = Row(family, METHODS[part], name, config)
        limit = max(1.0, task.seconds_left)
        done.update(training_rows.measure([row], task.repeats // 2, limit, in_process=task.small))
        print(*list(lines(done))[-1:], sep="\n", flush=True)
        return row, done[row]

    for batch in batches:
        row, found = measure(CM_JAX, batch)
        if not found.failure:
            break
    else:
        return
    seconds = statistics.median(found.seconds)
    task.record({"batch": batch, "images/s": batch / seconds, "milliseconds": 1000 * seconds, "peak": found.peak})
    for name in rivals:
        _, rival = measure(name, batch)
        if rival.seconds:
            task.record({f"to {name}": seconds / statistics.median(rival.seconds), f"peak of {name}": rival.peak})
    if task.folder and part == "cd" and COMPILED not in rivals:
        step: Any = build_step(row)  # last, because this process does not free GPU memory
        assert isinstance(step, JaxStep)
        step()
        save_profile(task, part, step.compiled(), step)


def start(task: Task) -> None:
    """Seconds from process start to the first image on disk, with an empty and a warm compilation cache."""
    bundled = ("emoji16_cd" if task.small else "emoji32", "float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _time_processes(task, *bundled, folder / "bundled", "bundled")
        if task.small or task.seconds_left < 60:
            return
        network: Any = task.network(IMAGENET64)
        checkpoint = folder / "imagenet64"
        config = ModelConfig(network, ConsistencyPreconditioning())
        Model(config, network.prepare(random_params(network))).save(checkpoint)
        _time_processes(task, str(checkpoint), "bfloat16", folder / "large", "ImageNet-64")


def _time_processes(task: Task, checkpoint: str, precision: str, cache: Path, name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    image = cache.with_suffix(".png")
    command = [sys.executable, "-m", "benchmarks.cold_start", checkpoint, precision, str(image), str(cache)]
    for state in ("empty", "warm") if task.small else ("empty", "warm", "warm"):
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, env=environment, timeout=max(1.0, task.seconds_left))
        seconds = time.perf_counter() - began
        assert image.is_file()
        image.unlink()
        print(f"First image of the {name} network, {state} compilation cache: {seconds:.1f} s.", flush=True)
        task.record({f"{name}, {state}": seconds})


PARTS: dict[str, Callable[[Task], None]] = {
    "ceilings": ceilings,
    "sampling": sampling,
    "cd": functools.partial(training_step, "cd", (EAGER,)),
    "ect": functools.partial(training_step, "ect", ()),
    "sct": functools.partial(training_step, "sct", ()),
    "edm": functools.partial(training_step, "edm", (EAGER,)),
    "start": start,
    "sampling-compiled": sampling_compiled,
    "cd-compiled": functools.partial(training_step, "cd", (COMPILED,)),
    "edm-compiled": functools.partial(training_step, "edm", (COMPILED,)),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("parts", help=f"Parts to run, comma-separated: {', '.join(PARTS)}.")
    options.add_argument("results", type=Path, help="Folder of the results.")
    options.add_argument("--seconds", type=float, default=600, help="Time limit in seconds.")
    options.add_argument("--small", action="store_true", help="Use tiny networks and few repeats.")
    options.add_argument("--folder", type=Path, help="Folder of profiles and compiled programs.")
    options.add_argument("--batch", type=int, default=0, help="Batch size of sampling-compiled.")
    options.add_argument(
        "--ceilings", type=float, nargs=2, metavar=("OPERATIONS", "BYTES"), help="Measured ceilings, per second."
    )
    args = options.parse_args()
    end = time.monotonic() + args.seconds
    limits = Ceilings(*args.ceilings) if args.ceilings else None
    for part in args.parts.split(","):

        def record(found: dict[str, Any], part: str = part) -> None:
            nonlocal limits
            if part == "ceilings" and "bytes" in found:
                limits = Ceilings(found["operations"], found["bytes"])
            with (args.results / f"{part}.json").open("a") as file:
                file.write(json.dumps(found) + "\n")

        record({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "torch": torch.__version__})
        PARTS[part](Task(args.small, end, record, limits, args.folder, args.batch))


if __name__ == "__main__":
    main()
