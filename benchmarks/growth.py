"""Cost of a training step against batch size, N, image size and devices: python -m benchmarks.growth --plot growth.png

Consistency distillation of a small network on CPU. Measures the time of a step, and for 1, 2, 4 and 8 devices the
bytes sent, from the collectives of the compiled program for pmap and for sharded state. Each point runs in its own
process.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import header, parser, row

SIZE, BATCH, NUM_LEVELS = 32, 8, 40
AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32),
    "num_levels": (10, 40, 160, 640),
    "size": (16, 32, 64),
    "devices": (1, 2, 4, 8),
}


def point(axis: str, value: int, repeats: int) -> dict[str, Any]:
    """Measure one point in this process."""
    import jax

    jax.config.update("jax_num_cpu_devices", value if axis == "devices" else 1)

    import numpy as np

    from benchmarks.hlo import collectives
    from benchmarks.random_params import random_params
    from benchmarks.step_time import train_config
    from benchmarks.training_rows import JaxStep
    from cm_jax.diffusion.consistency_function import ConsistencyFunction
    from cm_jax.diffusion.curricula import Constant
    from cm_jax.diffusion.preconditioning import EDMPreconditioning
    from cm_jax.networks import ADMUNet
    from cm_jax.objectives import ConsistencyDistillation
    from cm_jax.parallelism import Pmap, Sharded
    from cm_jax.training.setup import make_step
    from cm_jax.training.step import Constants, StepBatch

    settings = {"size": SIZE, "batch": BATCH, "num_levels": NUM_LEVELS} | (
        {axis: value} if axis != "devices" else {"batch": 16}
    )
    network = ADMUNet(
        image_size=settings["size"],
        base_channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        classes=10,
    )
    training = dataclasses.replace(
        train_config("imagenet64", "CD", settings["batch"], network),
        objective=ConsistencyDistillation(Constant(settings["num_levels"])),
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (settings["batch"], *network.image_shape), np.uint8)
    labels = rng.integers(0, 10, settings["batch"], np.int32)
    if axis != "devices":
        step = JaxStep(training, images, labels)
        began = time.perf_counter()
        step(None)
        first, seconds = time.perf_counter() - began, []
        for _ in range(repeats):
            began = time.perf_counter()
            step(None)
            seconds.append(time.perf_counter() - began)
        return {"ms": 1000 * statistics.median(seconds), "fastest": 1000 * min(seconds), "first_s": first}

    sent = {}
    for name, parallelism in (("pmap", Pmap(value)), ("sharded", Sharded(value))):
        training_step = make_step(training, ConsistencyFunction(network, EDMPreconditioning()))
        params = random_params(network)
        state = parallelism.place_state(training_step.initial_state(params))
        constants = parallelism.place_constants(Constants(teacher=params))
        program = parallelism.compile(functools.partial(training_step.run_steps, parallelism), state)
        batches = parallelism.place_batches(StepBatch(images[None], labels[None]))
        text = program.lower(state, constants, batches, jax.random.key(0)).compile().as_text()  # type: ignore[attr-defined]
        kinds: dict[str, int] = {}
        for kind, size in collectives(text):
            kinds[kind] = kinds.get(kind, 0) + size
        sent[name] = kinds
    return {"sent": sent, "parameters": 4 * network.parameter_count()}


def plot(found: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Three panels of step time, one of bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    names = {"batch": "batch size", "num_levels": "discretization steps N", "size": "image size", "devices": "devices"}
    for panel, (axis, points) in zip(panels, found.items(), strict=True):
        values = list(points)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.set_xlabel(names[axis])
        if axis == "devices":
            for name, marker in (("pmap", "o"), ("sharded", "s")):
                total = [sum(entry["sent"][name].values()) / entry["parameters"] for entry in points.values()]
                panel.plot(values, total, marker=marker, label=name)
            panel.set_ylabel("bytes sent per step / bytes of parameters")
            panel.set_ylim(bottom=0)
            panel.legend()
        else:
            times = [entry["ms"] for entry in points.values()]
            panel.plot(values, times, marker="o")
            panel.set_ylabel("ms per step")
            if axis == "num_levels":
                panel.set_ylim(bottom=0)
            else:
                panel.set_yscale("log", base=2)
                panel.set_yticks(times, [f"{value:.0f}" for value in times])
                panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=9, help="Number of timed steps per point.")
    options.add_argument("--plot", type=Path, help="PNG file to write.")
    options.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.point:
        print(json.dumps(point(args.point[0], int(args.point[1]), args.repeats)))
        return
    found: dict[str, dict[int, dict[str, Any]]] = {}
    print(header("Axis", "Value", "Median ms", "Fastest ms", "First step s"))
    for axis, values in AXES.items():
        found[axis] = {}
        for value in values:
            command = [sys.executable, "-m", "benchmarks.growth", "--point", axis, str(value)]
            command += ["--repeats", str(args.repeats)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            entry = found[axis][value] = json.loads(out.splitlines()[-1])
            if axis == "devices":
                for name, kinds in entry["sent"].items():
                    sent = ", ".join(f"{kind} {size / entry['parameters']:.3f}" for kind, size in kinds.items())
                    print(row(f"{axis}, {name}", value, f"{sent or 'nothing'} (x parameters)", "", ""), flush=True)
            else:
                print(
                    row(axis, value, f"{entry['ms']:.0f}", f"{entry['fastest']:.0f}", f"{entry['first_s']:.1f}"),
                    flush=True,
                )
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
