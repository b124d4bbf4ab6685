"""What `gpu` measures, part by part, each in a process of its own but for --small: python -m benchmarks.gpu_parts ...

A part prints a line as soon as it is known, and writes what `gpu` judges by as one JSON object a line. Its networks are
those of the presets in bfloat16; with --small they are tiny, so that all of it can be tried on a CPU.
"""

import argparse
import dataclasses
import functools
import gzip
import json
import math
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

from benchmarks import sampling_time, training_rows
from benchmarks.products import products
from benchmarks.profiles import Ceilings, Program, profiled, table
from benchmarks.random_params import random_params
from benchmarks.sampling_time import Batch, Forward
from benchmarks.step_time import HEADER, lines, setting
from benchmarks.torch_unet import OneStep
from benchmarks.training_rows import COMPILED, EAGER, OURS, Measured, Ours, Row, begin
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.model import Model
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.networks.adm_unet import IMAGENET64
from cm_jax.presets import PRESETS
from cm_jax.samplers import Consistency
from cm_jax.samplers.generation import images_from_noise
from cm_jax.types import Params

REPOSITORY = Path(__file__).resolve().parent.parent
SIGMA_MAX, SIGMA_MIN = 80.0, 0.002
TINY = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=32, classes=3
)
TINY_SONG = SongUNet(
    image_size=8, base_channels=16, channel_mult=(1,), blocks_per_level=1, embedding="positional", resampling="plain",
    pyramid=False,
)  # fmt: skip
METHODS = {"edm": "EDM", "cd": "CD", "ect": "ECT", "sct": "sCM"}
"""Parts that are training steps."""
Chosen = ADMUNet | SongUNet


@dataclasses.dataclass(frozen=True)
class Task:
    """What a part is told."""

    small: bool
    end: float
    """When it should have ended, by `time.monotonic`."""
    record: Callable[[dict[str, Any]], None]
    """Takes what is to be judged."""
    ceilings: Ceilings | None
    folder: Path | None
    """Where profiles and programs are wanted."""
    batch: int = 0
    """Of sampling, where another part found which is best."""

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def repeats(self) -> int:
        return 2 if self.small else 20

    def network(self, of: Chosen) -> Chosen:
        """In bfloat16; a tiny one of the same family where all is small."""
        tiny = TINY if isinstance(of, ADMUNet) else TINY_SONG
        return dataclasses.replace(
            tiny if self.small else of, precision="bfloat16", dropout=0.0, attention=of.attention
        )


def median_seconds(run: Callable[[], Any], rounds: int, times: int) -> float:
    """Of one call, out of rounds of so many calls that do not wait for each other."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(times)][-1])
        taken.append((time.perf_counter() - began) / times)
    return statistics.median(taken)


def ceilings(task: Task) -> None:
    """Operations a second of a large bfloat16 product, bytes a second of a large copy, read and written."""
    rounds, times = (2, 2) if task.small else (5, 20)
    fastest = 0.0
    for size in (256,) if task.small else (8192, 16384):
        left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
        product = jax.jit(jnp.dot)
        rate = 2 * size**3 / median_seconds(functools.partial(product, left, right), rounds, times)
        print(f"Product of {size}^2 by {size}^2, bfloat16: {rate / 1e12:.4g} TFLOP/s.", flush=True)
        fastest = max(fastest, rate)
    numbers = jax.random.normal(jax.random.key(0), (2**20 if task.small else 2**29,))
    copied = max(
        2 * numbers.nbytes / median_seconds(functools.partial(jax.jit(function), numbers), rounds, times)
        for function in (jnp.copy, lambda x: x + 1)
    )
    print(f"Copy of {numbers.nbytes / 1e9:.3g} GB: {copied / 1e12:.4g} TB/s, read and written.", flush=True)
    task.record({"operations": fastest, "bytes": copied})


# Sampling


_images = jax.jit(images_from_noise, static_argnums=(0, 1))


class OurSampler:
    """One-step images from normals that lie on the device, as `Model.sample` makes them: one program a batch size."""

    def __init__(self, function: ConsistencyFunction, params: Params) -> None:
        self.function = function
        self.params = function.network.prepare(params)
        self.levels = jnp.asarray([SIGMA_MAX, SIGMA_MIN])
        self.made: dict[int, tuple[jax.stages.Compiled, Forward]] = {}

    def __call__(self, batch: Batch) -> Forward:
        size = len(batch.x)
        if size not in self.made:
            noise, labels = jax.device_put((batch.x[None], batch.labels))
            compiled = _images.lower(self.function, Consistency(), self.params, self.levels, noise, labels).compile()
            arguments = (self.params, self.levels, noise, labels)
            self.made[size] = compiled, lambda: jax.block_until_ready(compiled(*arguments))
        return self.made[size][1]


def _theirs(model: Any, device: str) -> sampling_time.Contender:
    """PyTorch's, channels last; the normals are float32, as ours are."""
    return sampling_time.pytorch(lambda x, _, labels: model(x, labels), torch.channels_last, device=device)


class Sampling:
    """Both networks with the same weights, and what a comparison of them prints."""

    def __init__(self, task: Task) -> None:
        self.network: Any = task.network(IMAGENET64)
        params = random_params(self.network)
        function = ConsistencyFunction(self.network, ConsistencyPreconditioning())
        self.ours = OurSampler(function, params)
        torch.backends.cudnn.benchmark = True
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = OneStep(function, params, SIGMA_MAX, torch.bfloat16).to(self.device)
        self.model: Any = model.to(memory_format=torch.channels_last).requires_grad_(False)
        print("| batch | network | median ms | ratio | fastest ms | ratio | images/s | first output s | difference |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)

    def compared(self, size: int, repeats: int, theirs: dict[str, Any]) -> dict[str, sampling_time.Measured]:
        """Ours and theirs in turn."""
        batch = Batch.random(self.network, size)
        found = sampling_time.measure({"ours": self.ours, **theirs}, batch, repeats)
        print(*sampling_time.rows(size, found), sep="\n", flush=True)
        return found

    def beside(self, task: Task, size: int, name: str, model: Any) -> None:
        """The ratio of times, and PyTorch's peak of memory."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = self.compared(size, task.repeats, {name: _theirs(model, self.device)})
        if ratio := _ratio(found, name):
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else math.nan
            rate = size / statistics.median(found["ours"].seconds)
            found_here = {"batch": size, "images/s": rate, "peak": _our_peak()}
            task.record({**found_here, f"to {name}": ratio, f"peak of {name}": peak})


def sampling(task: Task) -> None:
    """One-step images: the better of two batches, latency of one image, PyTorch eager beside both, peaks of memory."""
    both = Sampling(task)
    operations = _operations(both.network)
    print(f"{operations / 1e9:.4g} GFLOP an image.", flush=True)
    best, found = {}, {}
    for size in (1, 2) if task.small else (256, 512):
        began = time.monotonic()
        entry = both.compared(size, task.repeats, {})["ours"]
        if entry.failure:
            break
        rate = size / statistics.median(entry.seconds)
        found = {
            "batch": size,
            "images/s": rate,
            "share": task.ceilings and rate * operations / task.ceilings.operations,
            "peak": _our_peak(),
            "needed": _needed(both.ours.made[size][0]),
        }
        memory = [f"{found[name] / 1e9:.2f}" for name in ("peak", "needed")]
        print(f"Batch {size}: peak {memory[0]} GB, the program by itself {memory[1]} GB.", flush=True)
        if best and rate < best["images/s"]:
            break
        best = found
        task.record(best)
        if task.left < 3 * (time.monotonic() - began):
            break  # what is left is for the rest
    if not best:
        return

    one = both.compared(1, 5 * task.repeats, {EAGER: _theirs(both.model, both.device)})
    if ratio := _ratio(one, EAGER):
        latency = statistics.median(one["ours"].seconds)
        print(f"One image: {1000 * latency:.3f} ms, {ratio:.2f} of PyTorch eager's.", flush=True)
        task.record({"latency": latency, "latency to eager": ratio})
    both.beside(task, best["batch"], EAGER, both.model)
    task.record(best)
    if task.folder:
        _read(task, "sampling", *both.ours.made[best["batch"]])


def sampling_compiled(task: Task) -> None:
    """The same beside what torch.compile makes of PyTorch's, at the batch that was best."""
    both = Sampling(task)
    how: Any = {"mode": "max-autotune"} if torch.cuda.is_available() else {"backend": "eager"}
    compiled = torch.compile(both.model, dynamic=False, **how)
    both.beside(task, task.batch or (2 if task.small else 256), COMPILED, compiled)


def _ratio(found: dict[str, sampling_time.Measured], name: str) -> float | None:
    ours, theirs = found["ours"], found[name]
    if ours.failure or theirs.failure:
        return None
    return statistics.median(ours.seconds) / statistics.median(theirs.seconds)


def _operations(network: Any) -> float:
    """Of the products of a forward pass, an image."""
    plain = dataclasses.replace(network, attention="plain")
    x = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    time_, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return sum(products(plain.predict, plain.shapes(), x, time_, labels if network.classes else None).values())


def _our_peak() -> float:
    found = jax.devices()[0].memory_stats() or {}
    return float(found.get("peak_bytes_in_use", math.nan))


def _needed(compiled: jax.stages.Compiled) -> float:
    """Bytes that the program takes by the compiler's plan: arguments, results and what lies between."""
    found = compiled.memory_analysis()
    if found is None:
        return math.nan
    return float(
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )


def _read(task: Task, name: str, compiled: jax.stages.Compiled, run: Callable[[], Any]) -> None:
    """The program and its profile: a table, and files for whoever wants to look closer. It may fail alone."""
    assert task.folder
    try:
        text = compiled.as_text() or ""
        with gzip.open(task.folder / f"{name}.hlo.txt.gz", "wt") as file:
            file.write(text)
        program = Program(text)
        with tempfile.TemporaryDirectory() as folder:
            spent = profiled(run, program, Path(folder))
        print(f"\nLargest costs of `{name}`:", *table(spent, task.ceilings), "", sep="\n", flush=True)
        analysis: Any = compiled.cost_analysis() or {}
        analysis = analysis[0] if isinstance(analysis, list) else analysis  # older versions give a list
        keep = {key: value for key, value in analysis.items() if key in ("flops", "bytes accessed", "transcendentals")}
        task.record(
            {
                f"{name}: compiler's costs": keep,
                f"{name}: instructions": program.counts(),
                f"{name}: bytes converted": program.converted(),
                f"{name}: profile": [each._asdict() for each in spent],
            }
        )
    except Exception as error:  # what was measured stands without it
        print(f"No profile of {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


# Training


def step(part: str, rivals: tuple[str, ...], task: Task) -> None:
    """A training step, and PyTorch's. The batch is the largest of some that fits."""
    family = "imagenet64" if part in ("edm", "cd") else "cifar10"
    made: Any = task.network(PRESETS[f"{family}-{part}"]().network)
    batches = (2,) if task.small else {"imagenet64": (32, 16), "cifar10": (256, 128)}[family]
    print(HEADER, flush=True)
    done: dict[Row, Measured] = {}

    def measured(name: str, batch: int) -> Measured:
        chosen = setting(family, METHODS[part], batch, made)
        chosen = dataclasses.replace(chosen, network=made)
        row = Row(family, METHODS[part], name, chosen)
        found = training_rows.measure([row], task.repeats // 2, max(1.0, task.left), here=task.small)[row]
        done[row] = found
        print(*list(lines(done))[-1:], sep="\n", flush=True)
        return found

    for batch in batches:
        ours = measured(OURS, batch)
        if not ours.failure:
            break
    else:
        return
    seconds = statistics.median(ours.seconds)
    task.record({"batch": batch, "images/s": batch / seconds, "milliseconds": 1000 * seconds, "peak": ours.peak})
    for name in rivals:
        theirs = measured(name, batch)
        if theirs.seconds:
            task.record({f"to {name}": seconds / statistics.median(theirs.seconds), f"peak of {name}": theirs.peak})
    if task.folder and part == "cd" and COMPILED not in rivals:
        (row,) = (row for row, found in done.items() if found is ours)
        program: Any = begin(row)  # at the end: this process does not give the GPU's memory back
        assert isinstance(program, Ours)
        program()
        _read(task, part, program.compiled(), program)


# Start


def start(task: Task) -> None:
    """Seconds from the start of a process to its first image on disk, with nothing compiled and with all of it."""
    networks: dict[str, str] = {"emoji16_cd" if task.small else "emoji32": "float32"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _started(task, *next(iter(networks.items())), folder / "bundled", "bundled")
        if task.small or task.left < 60:
            return
        network: Any = task.network(IMAGENET64)
        checkpoint = folder / "imagenet64"
        Model(
            ModelConfig(network, ConsistencyPreconditioning(), KarrasGrid(40)), network.prepare(random_params(network))
        ).save(checkpoint)
        _started(task, str(checkpoint), "bfloat16", folder / "large", "ImageNet-64")


def _started(task: Task, checkpoint: str, precision: str, folder: Path, name: str) -> None:
    for programs in ("none", "kept", "kept"):
        image = folder.with_suffix(".png")
        command = [sys.executable, "-m", "benchmarks.cold_start", checkpoint, precision, str(image), str(folder)]
        own = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        began = time.perf_counter()
        subprocess.run(command, cwd=REPOSITORY, check=True, env=own, timeout=max(1.0, task.left))
        seconds = time.perf_counter() - began
        assert image.is_file()
        image.unlink()
        print(f"First image of the {name} network, compiled programs: {programs}: {seconds:.1f} s.", flush=True)
        task.record({f"{name}, {programs}": seconds})
        if task.small and programs == "kept":
            return


PARTS: dict[str, Callable[[Task], None]] = {
    "ceilings": ceilings,
    "sampling": sampling,
    "cd": functools.partial(step, "cd", (EAGER,)),
    "ect": functools.partial(step, "ect", ()),
    "sct": functools.partial(step, "sct", ()),
    "edm": functools.partial(step, "edm", (EAGER,)),
    "start": start,
    "sampling-compiled": sampling_compiled,
    "cd-compiled": functools.partial(step, "cd", (COMPILED,)),
    "edm-compiled": functools.partial(step, "edm", (COMPILED,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", help=f"of {', '.join(PARTS)}, with commas between: in this process, one after the other"
    )
    parser.add_argument("records", type=Path, help="folder of what is recorded: NAME.json, an object a line")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", type=int, default=0, help="of images that are drawn")
    parser.add_argument("--ceilings", type=float, nargs=2, metavar=("OPERATIONS", "BYTES"))
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    limits = Ceilings(*asked.ceilings) if asked.ceilings else None
    for part in asked.parts.split(","):

        def record(found: dict[str, Any], part: str = part) -> None:
            nonlocal limits
            limits = (
                Ceilings(found["operations"], found["bytes"]) if part == "ceilings" and "bytes" in found else limits
            )
            with (asked.records / f"{part}.json").open("a") as file:
                file.write(json.dumps(found) + "\n")

        record({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "torch": torch.__version__})
        PARTS[part](Task(asked.small, end, record, limits, asked.folder, asked.batch))


if __name__ == "__main__":
    main()
