"""Forward time of a published network, ours beside PyTorch's, in one run: python -m benchmarks.sampling_time

On a CPU: float32, PyTorch in eager mode (diffusers' UNet2DModel) in both memory layouts. On a GPU: bfloat16, PyTorch in
eager mode and compiled (the network in torch_unet.py, because diffusers need not be installed there). The weights are
random and the same in all. Passes are interleaved, so that other work on the machine strikes all alike.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch

from benchmarks.random_params import random_params
from benchmarks.torch_unet import TorchUNet
from cm_jax import kernels
from cm_jax.networks import ADMUNet
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256
from cm_jax.types import Params

NETWORKS = {"imagenet64": IMAGENET64, "lsun256": LSUN256}


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of one pass: NHWC images, the network's clock, classes."""

    x: np.ndarray
    times: np.ndarray
    labels: np.ndarray | None

    @classmethod
    def random(cls, network: ADMUNet, size: int) -> "Batch":
        rng = np.random.default_rng(size)
        return cls(
            x=rng.standard_normal((size, *network.image_shape), np.float32),
            times=rng.uniform(-1500, 1100, size).astype(np.float32),
            labels=rng.integers(0, network.classes, size).astype(np.int32) if network.classes else None,
        )


Forward = Callable[[], Any]
"""One pass over inputs that lie on the device already; it returns when the result is there."""

Contender = Callable[[Batch], Forward]
"""Makes ready for a batch: places it, and compiles what is compiled beforehand."""


def ours(network: ADMUNet, params: Params, *, plain: bool = False) -> Contender:
    """Our network, compiled for each batch. plain: without the kernels for CPUs."""
    predict = jax.jit(network.predict)
    placed = network.prepare(params)

    def ready(batch: Batch) -> Forward:
        inputs = jax.device_put((batch.x, batch.times, batch.labels))
        with kernels.off() if plain else contextlib.nullcontext():
            compiled = predict.lower(placed, *inputs).compile()
        return lambda: jax.block_until_ready(compiled(placed, *inputs))

    return ready


def pytorch(
    model: Callable[..., torch.Tensor],
    layout: torch.memory_format,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Contender:
    """A PyTorch network that lies on `device` already."""

    def ready(batch: Batch) -> Forward:
        x = torch.from_numpy(batch.x.transpose(0, 3, 1, 2).copy()).to(device, dtype, memory_format=layout)
        times = torch.from_numpy(batch.times).to(device)
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).long().to(device)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                output = model(x, times, labels)
            if device == "cuda":
                torch.cuda.synchronize()
            return output

        return forward

    return ready


def on_cpu(network: ADMUNet, params: Params) -> dict[str, Contender]:
    """Float32: ours as `Model` draws, and by XLA alone; diffusers' in both memory layouts, and compiled."""
    from cm_jax.conversion.diffusers import DIFFUSERS
    from cm_jax.conversion.parity import reference_network
    from cm_jax.conversion.rules import to_source

    planar = reference_network(network, to_source(DIFFUSERS.rules(network), params))
    interleaved = copy.deepcopy(planar).to(memory_format=torch.channels_last)
    compiled: Any = torch.compile(copy.deepcopy(interleaved), dynamic=False)
    return {
        "ours": ours(network, params),
        "ours, XLA alone": ours(network, params, plain=True),
        "PyTorch, NCHW": pytorch(lambda x, t, c: planar(x, t, class_labels=c).sample, torch.contiguous_format),
        "PyTorch, channels last": pytorch(
            lambda x, t, c: interleaved(x, t, class_labels=c).sample, torch.channels_last
        ),
        "PyTorch, compiled": pytorch(lambda x, t, c: compiled(x, t, class_labels=c).sample, torch.channels_last),
    }


def on_gpu(network: ADMUNet, params: Params) -> dict[str, Contender]:
    """Bfloat16: ours, and the network in torch_unet.py, eager and compiled."""
    half = dataclasses.replace(network, precision="bfloat16")
    model: Any = TorchUNet(network, params).to("cuda", torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)
    compiled: Any = torch.compile(model, mode="max-autotune", dynamic=False)
    how: dict[str, Any] = {"layout": torch.channels_last, "device": "cuda", "dtype": torch.bfloat16}
    return {
        "ours": ours(half, params),
        "PyTorch, eager": pytorch(model, **how),
        "PyTorch, compiled": pytorch(compiled, **how),
    }


@dataclasses.dataclass
class Measured:
    """What a contender did with one batch."""

    first_output: float = 0.0
    """Seconds to the first output, with compilation."""
    output: np.ndarray | None = None
    """NHWC float32."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of every further pass."""
    failure: str = ""


def measure(contenders: dict[str, Contender], batch: Batch, repeats: int) -> dict[str, Measured]:
    """Every contender's first output, then `repeats` rounds of one pass each."""
    measured = {name: Measured() for name in contenders}
    forwards: dict[str, Forward] = {}
    for name, ready in contenders.items():
        began = time.perf_counter()
        try:
            forward = ready(batch)
            measured[name].output = _nhwc(forward())
        except Exception as error:  # out of memory, or no compiler: its row says so, and the others go on
            lines = str(error).strip().splitlines()
            measured[name].failure = f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
        else:
            measured[name].first_output = time.perf_counter() - began
            forwards[name] = forward
    for _ in range(repeats):
        for name, forward in forwards.items():
            began = time.perf_counter()
            forward()
            measured[name].seconds.append(time.perf_counter() - began)
    return measured


def _nhwc(output: Any) -> np.ndarray:
    if isinstance(output, torch.Tensor):
        return output.float().cpu().numpy().transpose(0, 2, 3, 1)
    return np.asarray(output)


def rows(size: int, measured: dict[str, Measured]) -> list[str]:
    """The table's lines for one batch size; ratios are to the best of PyTorch, differences to its first."""
    theirs = [entry for name, entry in measured.items() if name.startswith("PyTorch") and not entry.failure]
    best_median = min((statistics.median(entry.seconds) for entry in theirs), default=math.nan)
    best = min((min(entry.seconds) for entry in theirs), default=math.nan)
    lines = []
    for name, entry in measured.items():
        if entry.failure or entry.output is None:
            lines.append(f"| {size} | {name} | {entry.failure} | | | | | | |")
            continue
        median, fastest = statistics.median(entry.seconds), min(entry.seconds)
        difference = ""
        if theirs and entry is not theirs[0] and theirs[0].output is not None:
            reference = theirs[0].output
            difference = f"{np.abs(entry.output - reference).max() / np.abs(reference).max():.1e}"
        lines.append(
            f"| {size} | {name} | {1000 * median:.0f} | {median / best_median:.2f} | {1000 * fastest:.0f} | "
            f"{fastest / best:.2f} | {size / median:.2f} | {entry.first_output:.1f} | {difference} |"
        )
    return lines


def _busy_elsewhere() -> float:
    """CPU seconds that other programs have taken since Linux started; elsewhere it cannot be told."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return math.nan
    user, nice, system = map(int, counters.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="imagenet64")
    parser.add_argument("--batches", default="64,128,256,512" if gpu else "1,4", help="sizes with commas between")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 9, help="passes of each network after its first")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch on a CPU; JAX takes all cores")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.batches.split(",")]
    torch.set_num_threads(arguments.threads)

    kernels.keep_memory()  # as all commands do; PyTorch has it too here, in the same process
    before = os.getloadavg()[0]
    network = NETWORKS[arguments.network]
    contenders = (on_gpu if gpu else on_cpu)(network, random_params(network))
    device = jax.devices()[0].device_kind if gpu else f"{os.cpu_count()} cores, {arguments.threads} threads for PyTorch"
    print(f"On {device}; jax {jax.__version__}, torch {torch.__version__}; {arguments.repeats} repeats.", flush=True)
    print("| batch | network | median ms | ratio | fastest ms | ratio | images/s | first output s | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    began, elsewhere = time.perf_counter(), _busy_elsewhere()
    for size in sizes:
        print(*rows(size, measure(contenders, Batch.random(network, size), arguments.repeats)), sep="\n", flush=True)
        if gpu:
            torch.cuda.empty_cache()
    others = (_busy_elsewhere() - elsewhere) / (time.perf_counter() - began)
    print(f"Load average {before:.1f} before and {os.getloadavg()[0]:.1f} after; this program's own work counts in it.")
    print(
        f"Other programs kept {others:.2f} of the {os.cpu_count()} cores busy: PyTorch's threads suffer most from that."
    )


if __name__ == "__main__":
    main()
