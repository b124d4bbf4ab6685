"""Time and memory of FID's features, ours beside PyTorch's, in one run: python -m benchmarks.evaluation_time

From 8-bit images of 64 pixels on the host to the 2048 features of pool_3 on the host, resized as TensorFlow 1 did, in
float32, with the weights that CM_JAX_INCEPTION names; without them random ones, which take the same time. PyTorch's is
the graph in tests/torch_inception.py, in eager mode, in both memory layouts: pytorch-fid has the same layers, and
itself needs torchvision. Every row has a process of its own; batches are interleaved, and each must give the same
features in all, or the program ends with status 1. Peak memory is what a row adds on a CPU, what lies on a GPU.
With --beside 10, PyTorch's rows see one batch in ten: ratios are then of those batches alone.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch

from benchmarks.training_rows import resident
from cm_jax.conversion.metric_networks import inception_rules
from cm_jax.conversion.rules import to_source
from cm_jax.feature_networks import inception, inception_v3
from cm_jax.types import Params
from tests.torch_inception import Graph

OURS, NCHW, CHANNELS_LAST = "ours", "PyTorch, NCHW", "PyTorch, channels last"
BOUND = 1e-4
"""Largest difference of features, relative to the largest."""
HEADER = """\
| features by | images | batch | all s | median ms a batch | ratio | images/s | peak GB | first batch s | difference |
|---|---|---|---|---|---|---|---|---|---|"""

See = Callable[[np.ndarray], np.ndarray]
"""Images [b, h, w, 3] in 8 bits to features [b, 2048]."""


def weights() -> Params:
    """The real ones where the user has them, else random ones."""
    if os.environ.get(inception.FILE.variable):
        return inception.load()
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan = int(np.prod(leaf.shape[:-1]))
        if len(leaf.shape) == 4:
            return (rng.standard_normal(leaf.shape) * (2 / fan) ** 0.5).astype(np.float32)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, inception_v3.shapes(classifier=False))


def ours(params: Params) -> See:
    placed = jax.device_put(params)
    see = jax.jit(lambda params, images: inception.features(params, images).pool)
    return lambda images: np.asarray(see(placed, images))


def pytorch(params: Params, layout: torch.memory_format) -> See:
    graph, device = Graph(), "cuda" if torch.cuda.is_available() else "cpu"
    tensors = to_source(inception_rules("nvidia", classifier="logits" in params), params)
    graph.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, strict=False)
    layers: Any = graph.layers.eval()
    layers = layers.to(device, memory_format=layout)

    def see(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().contiguous(memory_format=layout)
            return layers((resized(x) - 128) / 128).flatten(1).cpu().numpy()

    return see


def resized(x: torch.Tensor) -> torch.Tensor:
    """As `cm_jax.feature_networks.inception.resized`."""
    for axis in (2, 3):
        size = x.shape[axis]
        places = torch.arange(inception_v3.SIZE, device=x.device, dtype=torch.float32) * (size / inception_v3.SIZE)
        before = places.floor().long()
        share = (places - before).reshape([-1 if i == axis else 1 for i in range(4)])
        low = x.index_select(axis, before)
        x = torch.lerp(low, x.index_select(axis, (before + 1).clamp(max=size - 1)), share)
    return x


def begin(name: str) -> See:
    params = weights()
    if name == OURS:
        return ours(params)
    return pytorch(params, torch.contiguous_format if name == NCHW else torch.channels_last)


@dataclasses.dataclass
class Measured:
    """What a row did."""

    first: float = 0.0
    """Seconds of the first batch, with compilation; it is seen again among the others."""
    images: int = 0
    """Seen, the first batch once."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of every whole batch."""
    beside: list[float] = dataclasses.field(default_factory=list)
    """Of the whole batches that every row saw."""
    total: float = 0.0
    """Of all batches, the last and smaller one among them."""
    peak: float = 0.0
    """Bytes."""
    difference: float = 0.0
    """Of features from ours, relative to the largest."""


def serve(name: str, threads: int, connection: Connection) -> None:
    """Answer every batch with seconds, features and the peak of memory."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    before, see = resident("VmRSS"), begin(name)
    while (images := connection.recv()) is not None:
        began = time.perf_counter()
        features = see(images)
        connection.send((time.perf_counter() - began, features, _peak(name, before)))


def _peak(name: str, before: float) -> float:
    if jax.default_backend() != "gpu":
        return resident("VmHWM") - before
    found = jax.devices()[0].memory_stats() if name == OURS else None
    return found["peak_bytes_in_use"] if found else torch.cuda.max_memory_allocated()


def batches(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        rng = np.random.default_rng(start)
        yield rng.integers(0, 256, (min(size, count - start), 64, 64, 3), np.uint8)


def measure(names: list[str], count: int, size: int, threads: int, every: int = 1) -> dict[str, Measured]:
    """A first batch of each row, then all: one in `every` is seen by all rows in turn, the others by the first row."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, Connection] = {}
    for name in names:
        rows[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, threads, theirs), daemon=True).start()
        theirs.close()
    found = {name: Measured() for name in names}
    first = next(batches(count, size))
    for name, row in rows.items():
        row.send(first)
        found[name].first = row.recv()[0]
    for index, images in enumerate(batches(count, size)):
        features, shared = {}, index % every == 0
        for name, row in rows.items() if shared else [(names[0], rows[names[0]])]:
            row.send(images)
            seconds, features[name], found[name].peak = row.recv()
            found[name].total += seconds
            found[name].images += len(images)
            if len(images) == size:
                found[name].seconds.append(seconds)
                found[name].beside += [seconds] * shared
        reference = features[names[0]]
        for name in features:
            apart = float(np.abs(features[name] - reference).max() / np.abs(reference).max())
            found[name].difference = max(found[name].difference, apart)
    for row in rows.values():
        row.send(None)
    return found


def lines(measured: dict[str, Measured], size: int) -> Iterator[str]:
    """The table's lines; ratios are to the best of PyTorch, over the batches that all saw."""
    best = min(statistics.median(entry.beside) for name, entry in measured.items() if name != OURS)
    for name, entry in measured.items():
        median, ratio = statistics.median(entry.seconds), statistics.median(entry.beside) / best
        yield (
            f"| {name} | {entry.images:,} | {size} | {entry.total:.1f} | {1000 * median:.0f} | {ratio:.2f} | "
            f"{size / median:.1f} | {entry.peak / 1e9:.2f} | {entry.first:.1f} | {entry.difference:.1e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96, help="images; 10000 is the real thing")
    parser.add_argument("--batch", type=int, default=32, help="images seen at once")
    parser.add_argument("--beside", type=int, default=1, metavar="N", help="PyTorch sees one batch in N")
    arguments = parser.parse_args()
    if not 1 <= arguments.batch <= arguments.count or arguments.beside < 1:
        parser.error("--batch and --beside must be 1 or more, and --count no less than --batch.")
    threads = os.cpu_count() or 1
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else f"{threads} cores and threads"
    real = "the published weights" if os.environ.get(inception.FILE.variable) else "random weights"
    print(f"On {device}; jax {jax.__version__}, torch {torch.__version__}; {real}.")
    print(HEADER, flush=True)
    before = os.getloadavg()[0]
    measured = measure([OURS, NCHW, CHANNELS_LAST], arguments.count, arguments.batch, threads, arguments.beside)
    print(*lines(measured, arguments.batch), sep="\n", flush=True)
    print(f"Load average {before:.1f} before and {os.getloadavg()[0]:.1f} after; this program's own work counts in it.")
    if max(entry.difference for entry in measured.values()) > BOUND:
        sys.exit(f"The features differ by more than {BOUND}: the times are not of the same work.")


if __name__ == "__main__":
    main()
