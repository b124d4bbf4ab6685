"""How the cost of a training step grows: python -m benchmarks.growth --plot docs/images/growth.png

Consistency distillation of a small network on a CPU: time of a step against the batch, the number of levels N and the
image's size, and the bytes that 1, 2, 4 and 8 devices send each other, read off the compiled program for pmap and for
sharded state. Every point has a process of its own.
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

SIZE, BATCH, LEVELS = 32, 8, 40
AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32),
    "levels": (10, 40, 160, 640),
    "size": (16, 32, 64),
    "devices": (1, 2, 4, 8),
}


def point(axis: str, value: int, repeats: int) -> dict[str, Any]:
    """One point, in this process."""
    import jax

    jax.config.update("jax_num_cpu_devices", value if axis == "devices" else 1)

    import numpy as np

    from benchmarks.hlo import collectives
    from benchmarks.random_params import random_params
    from benchmarks.step_time import setting
    from benchmarks.training_rows import Ours
    from cm_jax.diffusion.consistency_function import ConsistencyFunction
    from cm_jax.diffusion.curricula import Constant
    from cm_jax.diffusion.noise_schedule import KarrasGrid
    from cm_jax.diffusion.preconditioning import EDMPreconditioning
    from cm_jax.networks import ADMUNet
    from cm_jax.objectives import ConsistencyDistillation
    from cm_jax.training.parallelism import Pmap, Sharded
    from cm_jax.training.state import Constants, RawBatch

    chosen = {"size": SIZE, "batch": BATCH, "levels": LEVELS} | ({axis: value} if axis != "devices" else {"batch": 16})
    network = ADMUNet(
        image_size=chosen["size"],
        base_channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        classes=10,
    )
    training = dataclasses.replace(
        setting("imagenet64", "CD", chosen["batch"], network),
        objective=ConsistencyDistillation(Constant(chosen["levels"])),
        grid=KarrasGrid(levels=chosen["levels"]),
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (chosen["batch"], *network.image_shape), np.uint8)
    labels = rng.integers(0, 10, chosen["batch"], np.int32)
    if axis != "devices":
        step = Ours(training, images, labels)
        began = time.perf_counter()
        step(None)
        first, seconds = time.perf_counter() - began, []
        for _ in range(repeats):
            began = time.perf_counter()
            step(None)
            seconds.append(time.perf_counter() - began)
        return {"ms": 1000 * statistics.median(seconds), "fastest": 1000 * min(seconds), "first_s": first}

    sent = {}
    for name, across in (("pmap", Pmap(value)), ("sharded", Sharded(value))):
        training_step = training.step(ConsistencyFunction(network, EDMPreconditioning()))
        params = random_params(network)
        state = across.place_state(training_step.initial(params))
        constants = across.place_constants(Constants(teacher=params))
        program = across.compile(functools.partial(training_step.many, across), state, constants)
        batches = across.place_batches(RawBatch(images[None], labels[None]))
        text = program.lower(state, constants, batches, jax.random.key(0)).compile().as_text()  # type: ignore[attr-defined]
        kinds: dict[str, int] = {}
        for kind, size in collectives(text):
            kinds[kind] = kinds.get(kind, 0) + size
        sent[name] = kinds
    return {"sent": sent, "parameters": 4 * network.parameter_count()}


def plot(found: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Four panels: three of time, one of traffic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    names = {"batch": "images in a batch", "levels": "levels N", "size": "pixels across", "devices": "devices"}
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
            panel.set_ylabel("sent a step / size of the parameters")
            panel.set_ylim(bottom=0)
            panel.legend()
        else:
            times = [entry["ms"] for entry in points.values()]
            panel.plot(values, times, marker="o")
            panel.set_ylabel("ms a step")
            if axis == "levels":
                panel.set_ylim(bottom=0)
            else:
                panel.set_yscale("log", base=2)
                panel.set_yticks(times, [f"{value:.0f}" for value in times])
                panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each point")
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(arguments.point[0], int(arguments.point[1]), arguments.repeats)))
        return
    found: dict[str, dict[int, dict[str, Any]]] = {}
    print("| axis | value | median ms | fastest ms | first step s |\n|---|---|---|---|---|")
    for axis, values in AXES.items():
        found[axis] = {}
        for value in values:
            command = [sys.executable, "-m", "benchmarks.growth", "--point", axis, str(value)]
            command += ["--repeats", str(arguments.repeats)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            entry = found[axis][value] = json.loads(out.splitlines()[-1])
            if axis == "devices":
                for name, kinds in entry["sent"].items():
                    told = ", ".join(f"{kind} {size / entry['parameters']:.3f}" for kind, size in kinds.items())
                    print(f"| {axis}, {name} | {value} | times the parameters: {told or 'nothing'} | | |", flush=True)
            else:
                print(
                    f"| {axis} | {value} | {entry['ms']:.0f} | {entry['fastest']:.0f} | {entry['first_s']:.1f} |",
                    flush=True,
                )
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
