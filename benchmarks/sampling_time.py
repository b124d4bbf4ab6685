"""Time of a forward pass of a published network, compared with PyTorch: python -m benchmarks.sampling_time

On CPU: float32; PyTorch runs the UNet2DModel of diffusers in eager mode, NCHW and channels last, and compiled. On GPU:
bfloat16; PyTorch runs the network of torch_unet.py (no diffusers needed), eager and compiled. All use the same random
weights. Passes alternate, so that other load affects all rows equally.
"""

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

from benchmarks.common import failure, header, load_average, parser, row
from benchmarks.random_params import random_params
from benchmarks.torch_unet import TorchUNet
from cm_jax import kernels
from cm_jax.networks import ADMUNet
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256
from cm_jax.types import Params

NETWORKS = {"imagenet64": IMAGENET64, "lsun256": LSUN256}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one pass: NHWC images, c_noise and labels."""

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
"""One pass over inputs on the device; returns when the result is prepare."""

Implementation = Callable[[Batch], Forward]
"""Moves a batch to the device, compiles for it and returns the pass."""


def cm_jax(network: ADMUNet, params: Params, *, plain: bool = False) -> Implementation:
    """The cm_jax network, compiled for each batch; `plain` disables the CPU kernels."""
    predict = jax.jit(network.predict)
    placed = network.prepare(params)

    def prepare(batch: Batch) -> Forward:
        inputs = jax.device_put((batch.x, batch.times, batch.labels))
        with kernels.off() if plain else contextlib.nullcontext():
            compiled = predict.lower(placed, *inputs).compile()
        return lambda: jax.block_until_ready(compiled(placed, *inputs))

    return prepare


def pytorch(
    model: Callable[..., torch.Tensor],
    layout: torch.memory_format,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Implementation:
    """A PyTorch network on `device`."""

    def prepare(batch: Batch) -> Forward:
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

    return prepare


def on_cpu(network: ADMUNet, params: Params) -> dict[str, Implementation]:
    """Float32: cm_jax with and without the CPU kernels; diffusers in NCHW, channels last, and compiled."""
    from cm_jax.conversion.parity import reference_network
    from cm_jax.conversion.rules import to_source
    from cm_jax.conversion.unet_format import DIFFUSERS

    nchw = reference_network(network, to_source(DIFFUSERS.rules(network), params))
    channels_last = copy.deepcopy(nchw).to(memory_format=torch.channels_last)
    compiled: Any = torch.compile(copy.deepcopy(channels_last), dynamic=False)
    return {
        "cm_jax": cm_jax(network, params),
        "cm_jax, XLA only": cm_jax(network, params, plain=True),
        "PyTorch, NCHW": pytorch(lambda x, t, c: nchw(x, t, class_labels=c).sample, torch.contiguous_format),
        "PyTorch, channels last": pytorch(
            lambda x, t, c: channels_last(x, t, class_labels=c).sample, torch.channels_last
        ),
        "PyTorch, compiled": pytorch(lambda x, t, c: compiled(x, t, class_labels=c).sample, torch.channels_last),
    }


def on_gpu(network: ADMUNet, params: Params) -> dict[str, Implementation]:
    """Bfloat16: cm_jax, and the network of torch_unet.py, eager and compiled."""
    half = dataclasses.replace(network, precision="bfloat16")
    model: Any = TorchUNet(network, params).to("cuda", torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)
    compiled: Any = torch.compile(model, mode="max-autotune", dynamic=False)
    options: dict[str, Any] = {"layout": torch.channels_last, "device": "cuda", "dtype": torch.bfloat16}
    return {
        "cm_jax": cm_jax(half, params),
        "PyTorch, eager": pytorch(model, **options),
        "PyTorch, compiled": pytorch(compiled, **options),
    }


@dataclasses.dataclass
class Measurement:
    """Measurements of an implementation with one batch."""

    first_output: float = 0.0
    """Seconds to the first output, including compilation."""
    output: np.ndarray | None = None
    """NHWC float32."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Seconds of each later pass."""
    failure: str = ""


def measure(implementations: dict[str, Implementation], batch: Batch, repeats: int) -> dict[str, Measurement]:
    """First output of each implementation, then `repeats` rounds of one pass each."""
    measured = {name: Measurement() for name in implementations}
    forwards: dict[str, Forward] = {}
    for name, prepare in implementations.items():
        began = time.perf_counter()
        try:
            forward = prepare(batch)
            measured[name].output = _nhwc(forward())
        except Exception as error:  # e.g. out of memory: reported in the table
            measured[name].failure = failure(error)
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


HEADER = header(
    *("Batch", "Implementation", "Median ms", "Ratio", "Fastest ms", "Ratio"),
    *("Images/s", "First output s", "Difference"),
)


def rows(size: int, measured: dict[str, Measurement]) -> list[str]:
    """Table rows of one batch size; ratios are to the fastest PyTorch row, differences to the first PyTorch row."""
    rivals = [entry for name, entry in measured.items() if name.startswith("PyTorch") and not entry.failure]
    best_median = min((statistics.median(entry.seconds) for entry in rivals), default=math.nan)
    best = min((min(entry.seconds) for entry in rivals), default=math.nan)
    lines = []
    for name, entry in measured.items():
        if entry.failure or entry.output is None:
            lines.append(row(size, name, entry.failure, *[""] * 6))
            continue
        median, fastest = statistics.median(entry.seconds), min(entry.seconds)
        difference = ""
        if rivals and entry is not rivals[0] and rivals[0].output is not None:
            reference = rivals[0].output
            difference = f"{np.abs(entry.output - reference).max() / np.abs(reference).max():.1e}"
        lines.append(
            row(
                *(size, name, f"{1000 * median:.0f}", f"{median / best_median:.2f}", f"{1000 * fastest:.0f}"),
                *(f"{fastest / best:.2f}", f"{size / median:.2f}", f"{entry.first_output:.1f}", difference),
            )
        )
    return lines


def _cpu_seconds_of_others() -> float:
    """CPU seconds used by other programs since boot; NaN where /proc/stat does not exist."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return math.nan
    user, nice, system = map(int, counters.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    options = parser(__doc__)
    options.add_argument("--network", choices=NETWORKS, default="imagenet64", help="Network to measure.")
    options.add_argument("--batches", default="64,128,256,512" if gpu else "1,4", help="Batch sizes, comma-separated.")
    options.add_argument("--repeats", type=int, default=20 if gpu else 9, help="Number of timed passes per row.")
    options.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads of PyTorch; JAX uses all cores."
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    kernels.keep_memory()  # as in every command; also affects PyTorch in this process
    before = os.getloadavg()[0]
    network = NETWORKS[args.network]
    implementations = (on_gpu if gpu else on_cpu)(network, random_params(network))
    device = jax.devices()[0].device_kind if gpu else f"{os.cpu_count()} cores, {args.threads} threads for PyTorch"
    print(f"On {device}; jax {jax.__version__}, torch {torch.__version__}; {args.repeats} repeats.", flush=True)
    print(HEADER)
    began, others = time.perf_counter(), _cpu_seconds_of_others()
    for size in map(int, args.batches.split(",")):
        measured = measure(implementations, Batch.random(network, size), args.repeats)
        print(*rows(size, measured), sep="\n", flush=True)
        if gpu:
            torch.cuda.empty_cache()
    busy = (_cpu_seconds_of_others() - others) / (time.perf_counter() - began)
    print(load_average(before))
    print(f"Other programs used {busy:.2f} of {os.cpu_count()} cores, which slows PyTorch more than JAX.")


if __name__ == "__main__":
    main()
