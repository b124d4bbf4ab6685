"""Common to all parts of `benchmarks.gpu`: limits and networks of a part, memory measurements, profiles."""

import dataclasses
import gzip
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch

from benchmarks.common import failure
from benchmarks.profiles import Ceilings, profile, table
from benchmarks.program import Program
from cm_jax.networks import ADMUNet, BuiltInNetwork, SongUNet

TINY = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=32, classes=3
)
TINY_SONG = SongUNet(
    image_size=8, base_channels=16, channel_mult=(1,), blocks_per_level=1, embedding="positional", resampling="plain",
    pyramid=False,
)  # fmt: skip
Network = BuiltInNetwork


@dataclasses.dataclass(frozen=True)
class Task:
    """Options and limits of a part."""

    small: bool
    """Whether to use tiny networks and few repeats."""
    end: float
    """Deadline by `time.monotonic`."""
    record: Callable[[dict[str, Any]], None]
    """Stores results."""
    ceilings: Ceilings | None
    folder: Path | None
    """Folder of profiles and compiled programs."""
    batch: int = 0
    """Best batch size of the part `sampling`; 0 if unknown."""

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def repeats(self) -> int:
        return 2 if self.small else 20

    def network(self, network: Network) -> Network:
        """`network` without dropout in bfloat16, or a tiny one of the same family if `small`."""
        tiny = TINY if isinstance(network, ADMUNet) else TINY_SONG
        return dataclasses.replace(
            tiny if self.small else network, precision="bfloat16", dropout=0.0, attention=network.attention
        )


def jax_peak_memory() -> float:
    """Peak bytes of the JAX allocator; NaN on CPU."""
    found = jax.devices()[0].memory_stats() or {}
    return float(found.get("peak_bytes_in_use", math.nan))


def torch_peak_memory() -> float:
    """Peak bytes of the PyTorch allocator; NaN on CPU."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else math.nan


def planned_memory(compiled: jax.stages.Compiled) -> float:
    """Bytes of a program by the compiler's plan: arguments, results and temporaries."""
    found = compiled.memory_analysis()
    if found is None:
        return math.nan
    return float(
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )


def save_profile(task: Task, name: str, compiled: jax.stages.Compiled, run: Callable[[], Any]) -> None:
    """Profile a program: print its largest costs, record them, and write the program to the folder of the task.

    An exception is printed and does not end the part.
    """
    assert task.folder
    try:
        text = compiled.as_text() or ""
        with gzip.open(task.folder / f"{name}.hlo.txt.gz", "wt") as file:
            file.write(text)
        program = Program(text)
        with tempfile.TemporaryDirectory() as folder:
            costs = profile(run, program, Path(folder))
        print(f"\nLargest costs of `{name}`:", *table(costs, task.ceilings), "", sep="\n", flush=True)
        analysis: Any = compiled.cost_analysis() or {}
        analysis = analysis[0] if isinstance(analysis, list) else analysis  # a list in older JAX versions
        keep = {key: value for key, value in analysis.items() if key in ("flops", "bytes accessed", "transcendentals")}
        task.record(
            {
                f"{name}: compiler's costs": keep,
                f"{name}: instructions": program.counts(),
                f"{name}: bytes converted": program.converted(),
                f"{name}: profile": [cost._asdict() for cost in costs],
            }
        )
    except Exception as error:
        print(f"No profile of {name}: {failure(error)}", flush=True)
