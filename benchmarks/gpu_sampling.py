"""Parts `sampling` and `sampling-compiled` of `benchmarks.gpu`: one-step ImageNet-64 images, compared with PyTorch."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import sampling_time
from benchmarks.gpu import COMPILED, EAGER
from benchmarks.gpu_task import Task, jax_peak_memory, planned_memory, save_profile, torch_peak_memory
from benchmarks.products import products
from benchmarks.random_params import random_params
from benchmarks.sampling_time import Batch, Forward, Measurement
from benchmarks.torch_unet import OneStep
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.networks.adm_unet import IMAGENET64
from cm_jax.samplers import Consistency
from cm_jax.samplers.generation import images_from_noise
from cm_jax.types import Params

SIGMA_MAX, SIGMA_MIN = 80.0, 0.002
CM_JAX = "cm_jax"

_images = jax.jit(images_from_noise, static_argnums=(0, 1))


class JaxSampler:
    """One-step sampling as in `Model.sample`, from noise on the device; compiled once per batch size."""

    def __init__(self, function: ConsistencyFunction, params: Params) -> None:
        self.function = function
        self.params = function.network.prepare(params)
        self.levels = jnp.asarray([SIGMA_MAX, SIGMA_MIN])
        self.programs: dict[int, tuple[jax.stages.Compiled, Forward]] = {}

    def __call__(self, batch: Batch) -> Forward:
        size = len(batch.x)
        if size not in self.programs:
            noise, labels = jax.device_put((batch.x[None], batch.labels))
            compiled = _images.lower(self.function, Consistency(), self.params, self.levels, noise, labels).compile()
            arguments = (self.params, self.levels, noise, labels)
            self.programs[size] = compiled, lambda: jax.block_until_ready(compiled(*arguments))
        return self.programs[size][1]


class Comparison:
    """cm_jax and PyTorch with the same ImageNet-64 weights; prints a table of comparisons."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.network: Any = task.network(IMAGENET64)
        params = random_params(self.network)
        function = ConsistencyFunction(self.network, ConsistencyPreconditioning())
        self.sampler = JaxSampler(function, params)
        torch.backends.cudnn.benchmark = True
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = OneStep(function, params, SIGMA_MAX, torch.bfloat16).to(self.device)
        self.model: Any = model.to(memory_format=torch.channels_last).requires_grad_(False)
        print(sampling_time.HEADER, flush=True)

    def measure(self, size: int, repeats: int, name: str = "", model: Any = None) -> dict[str, Measurement]:
        """Measure cm_jax and, if given, a PyTorch model called `name`, at one batch size."""
        implementations: dict[str, sampling_time.Implementation] = {CM_JAX: self.sampler}
        if model is not None:
            implementations[name] = sampling_time.pytorch(
                lambda x, _, labels: model(x, labels), torch.channels_last, device=self.device
            )
        found = sampling_time.measure(implementations, Batch.random(self.network, size), repeats)
        print(*sampling_time.rows(size, found), sep="\n", flush=True)
        return found

    def record(self, size: int, name: str, model: Any) -> None:
        """Record the time ratio to a PyTorch model, and its peak memory."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = self.measure(size, self.task.repeats, name, model)
        if ratio := _ratio(found, name):
            rate = size / statistics.median(found[CM_JAX].seconds)
            results = {"batch": size, "images/s": rate, "peak": jax_peak_memory()}
            self.task.record({**results, f"to {name}": ratio, f"peak of {name}": torch_peak_memory()})


def sampling(task: Task) -> None:
    """Throughput at the better of two batch sizes, latency of one image, peak memory; compared with eager PyTorch."""
    comparison = Comparison(task)
    operations = _operations(comparison.network)
    print(f"{operations / 1e9:.4g} GFLOP per image.", flush=True)
    best: dict[str, Any] = {}
    for size in (1, 2) if task.small else (256, 512):
        began = time.monotonic()
        entry = comparison.measure(size, task.repeats)[CM_JAX]
        if entry.failure:
            break
        rate = size / statistics.median(entry.seconds)
        found = {
            "batch": size,
            "images/s": rate,
            "share": task.ceilings and rate * operations / task.ceilings.operations,
            "peak": jax_peak_memory(),
            "needed": planned_memory(comparison.sampler.programs[size][0]),
        }
        memory = [f"{found[name] / 1e9:.2f}" for name in ("peak", "needed")]
        print(f"Batch {size}: peak {memory[0]} GB; the program needs {memory[1]} GB.", flush=True)
        if best and rate < best["images/s"]:
            break
        best = found
        task.record(best)
        if task.seconds_left < 3 * (time.monotonic() - began):
            break  # leave time for the other measurements
    if not best:
        return

    one = comparison.measure(1, 5 * task.repeats, EAGER, comparison.model)
    if ratio := _ratio(one, EAGER):
        latency = statistics.median(one[CM_JAX].seconds)
        print(f"One image: {1000 * latency:.3f} ms, {ratio:.2f} of eager PyTorch.", flush=True)
        task.record({"latency": latency, "latency to eager": ratio})
    comparison.record(best["batch"], EAGER, comparison.model)
    task.record(best)
    if task.folder:
        save_profile(task, "sampling", *comparison.sampler.programs[best["batch"]])


def sampling_compiled(task: Task) -> None:
    """Compare with `torch.compile`, at the best batch size of `sampling`."""
    comparison = Comparison(task)
    options: Any = {"mode": "max-autotune"} if torch.cuda.is_available() else {"backend": "eager"}
    compiled = torch.compile(comparison.model, dynamic=False, **options)
    comparison.record(task.batch or (2 if task.small else 256), COMPILED, compiled)


def _ratio(found: dict[str, Measurement], name: str) -> float | None:
    """Median time of cm_jax / median time of `name`; None if one of them failed."""
    cm_jax, rival = found[CM_JAX], found[name]
    if cm_jax.failure or rival.failure:
        return None
    return statistics.median(cm_jax.seconds) / statistics.median(rival.seconds)


def _operations(network: Any) -> float:
    """Operations of the products and convolutions of a forward pass, per image."""
    plain = dataclasses.replace(network, attention="plain")
    x = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    times, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return sum(products(plain.predict, plain.shapes(), x, times, labels if network.classes else None).values())
