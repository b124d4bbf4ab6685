"""Time and memory of FID features, compared with PyTorch: python -m benchmarks.evaluation_time

Measures from 8-bit 64x64 images on the host to the 2048 features of pool_3 on the host, in float32, including the
resize of TensorFlow 1. Uses the weights named by CM_JAX_INCEPTION, or random ones, which take the same time. PyTorch
runs the graph of tests/torch_inception.py (the layers of pytorch-fid, without torchvision) in eager mode, NCHW and
channels last. Each row runs in its own process; batches alternate. Exits with 1 if the features differ by more than
1e-4. Peak memory is the increase of the process on CPU and the peak of the allocator on GPU. With --compare-every N,
PyTorch processes one batch in N, and ratios use these batches only.
"""

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

from benchmarks.common import header, load_average, parser, process_memory, row
from benchmarks.training_rows import peak_memory
from cm_jax.conversion.metric_networks import inception_rules
from cm_jax.conversion.rules import to_source
from cm_jax.evaluation import load_inception
from cm_jax.feature_networks import inception_v3
from cm_jax.types import Params
from tests.torch_inception import Graph

CM_JAX, NCHW, CHANNELS_LAST = "cm_jax", "PyTorch, NCHW", "PyTorch, channels last"
BOUND = 1e-4
"""Maximum difference of features, relative to the largest feature."""
HEADER = header(
    *("Implementation", "Images", "Batch", "Total s", "Median ms per batch", "Ratio"),
    *("Images/s", "Peak GB", "First batch s", "Difference"),
)

Extract = Callable[[np.ndarray], np.ndarray]
"""8-bit images [b, h, w, 3] to features [b, 2048]."""


def weights() -> Params:
    """The weights named by CM_JAX_INCEPTION, else random ones."""
    if os.environ.get(inception_v3.FILE.variable):
        return load_inception().params
    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan = int(np.prod(leaf.shape[:-1]))
        if len(leaf.shape) == 4:
            return (rng.standard_normal(leaf.shape) * (2 / fan) ** 0.5).astype(np.float32)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree.map(random, inception_v3.shapes(classifier=False))


def jax_extractor(params: Params) -> Extract:
    placed = jax.device_put(params)
    extract = jax.jit(lambda params, images: inception_v3.features(params, images).pool)
    return lambda images: np.asarray(extract(placed, images))


def torch_extractor(params: Params, layout: torch.memory_format) -> Extract:
    graph, device = Graph(), "cuda" if torch.cuda.is_available() else "cpu"
    tensors = to_source(inception_rules("nvidia", classifier="logits" in params), params)
    graph.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, strict=False)
    layers: Any = graph.layers.eval()
    layers = layers.to(device, memory_format=layout)

    def extract(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().contiguous(memory_format=layout)
            return layers((resized(x) - 128) / 128).flatten(1).cpu().numpy()

    return extract


def resized(x: torch.Tensor) -> torch.Tensor:
    """The PyTorch version of `cm_jax.feature_networks.inception_v3.resized`."""
    for axis in (2, 3):
        size = x.shape[axis]
        positions = torch.arange(inception_v3.SIZE, device=x.device, dtype=torch.float32) * (size / inception_v3.SIZE)
        floor = positions.floor().long()
        share = (positions - floor).reshape([-1 if i == axis else 1 for i in range(4)])
        low = x.index_select(axis, floor)
        x = torch.lerp(low, x.index_select(axis, (floor + 1).clamp(max=size - 1)), share)
    return x


def build(name: str) -> Extract:
    params = weights()
    if name == CM_JAX:
        return jax_extractor(params)
    return torch_extractor(params, torch.contiguous_format if name == NCHW else torch.channels_last)


@dataclasses.dataclass
class Measurement:
    """Measurements of a row."""

    first: float = 0.0
    """Seconds of a first batch, including compilation; this batch is repeated later."""
    images: int = 0
    """Number of images, without the first batch."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Seconds of each full batch."""
    compared: list[float] = dataclasses.field(default_factory=list)
    """Seconds of the full batches that every row processed."""
    total: float = 0.0
    """Seconds of all batches, including a smaller last one."""
    peak: float = 0.0
    """Peak memory in bytes."""
    difference: float = 0.0
    """Difference of features from cm_jax, relative to the largest feature."""


def serve(name: str, threads: int, connection: Connection) -> None:
    """Answer each batch with (seconds, features, peak memory)."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision
    before, extract = process_memory("VmRSS"), build(name)
    while (images := connection.recv()) is not None:
        began = time.perf_counter()
        features = extract(images)
        connection.send((time.perf_counter() - began, features, peak_memory(before, jax_allocator=name == CM_JAX)))


def batches(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        rng = np.random.default_rng(start)
        yield rng.integers(0, 256, (min(size, count - start), 64, 64, 3), np.uint8)


def measure(names: list[str], count: int, size: int, threads: int, every: int = 1) -> dict[str, Measurement]:
    """Process a first batch, then all batches: every row gets one batch in `every`, the first row gets all."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, Connection] = {}
    for name in names:
        rows[name], child = context.Pipe()
        context.Process(target=serve, args=(name, threads, child), daemon=True).start()
        child.close()
    found = {name: Measurement() for name in names}
    first = next(batches(count, size))
    for name, connection in rows.items():
        connection.send(first)
        found[name].first = connection.recv()[0]
    for index, images in enumerate(batches(count, size)):
        features, shared = {}, index % every == 0
        for name, connection in rows.items() if shared else [(names[0], rows[names[0]])]:
            connection.send(images)
            seconds, features[name], found[name].peak = connection.recv()
            found[name].total += seconds
            found[name].images += len(images)
            if len(images) == size:
                found[name].seconds.append(seconds)
                found[name].compared += [seconds] * shared
        reference = features[names[0]]
        for name in features:
            difference = float(np.abs(features[name] - reference).max() / np.abs(reference).max())
            found[name].difference = max(found[name].difference, difference)
    for connection in rows.values():
        connection.send(None)
    return found


def lines(measured: dict[str, Measurement], size: int) -> Iterator[str]:
    """Table rows. Ratios are to the fastest PyTorch row, over the batches that every row processed."""
    best = min(statistics.median(entry.compared) for name, entry in measured.items() if name != CM_JAX)
    for name, entry in measured.items():
        median, ratio = statistics.median(entry.seconds), statistics.median(entry.compared) / best
        yield row(
            *(name, f"{entry.images:,}", size, f"{entry.total:.1f}", f"{1000 * median:.0f}", f"{ratio:.2f}"),
            *(f"{size / median:.1f}", f"{entry.peak / 1e9:.2f}", f"{entry.first:.1f}", f"{entry.difference:.1e}"),
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=96, help="Number of images; FID usually needs 10000 or more.")
    options.add_argument("--batch", type=int, default=32, help="Batch size.")
    options.add_argument("--compare-every", type=int, default=1, metavar="N", help="PyTorch processes one batch in N.")
    args = options.parse_args()
    if not 1 <= args.batch <= args.count or args.compare_every < 1:
        options.error("Expected 1 <= --batch <= --count and --compare-every >= 1.")
    threads = os.cpu_count() or 1
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else f"{threads} cores and threads"
    kind = "published" if os.environ.get(inception_v3.FILE.variable) else "random"
    print(f"On {device}; jax {jax.__version__}, torch {torch.__version__}; {kind} weights.")
    print(HEADER, flush=True)
    before = os.getloadavg()[0]
    measured = measure([CM_JAX, NCHW, CHANNELS_LAST], args.count, args.batch, threads, args.compare_every)
    print(*lines(measured, args.batch), sep="\n", flush=True)
    print(load_average(before))
    difference = max(entry.difference for entry in measured.values())
    if difference > BOUND:
        sys.exit(
            f"Expected features that differ by at most {BOUND}, got {difference:.1e}: the times are not comparable."
        )


if __name__ == "__main__":
    main()
