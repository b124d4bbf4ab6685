"""Rows of step_time: build and measure a training step of cm_jax or PyTorch, usually in a subprocess."""

import dataclasses
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.common import failure, process_memory
from benchmarks.random_params import random_params
from benchmarks.torch_training import DiffusersADM, NoiseSample, TorchStep
from benchmarks.torch_unet import TorchUNet
from cm_jax import kernels
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.preconditioning import EDMPreconditioning, LogSigmaPreconditioning
from cm_jax.networks import ADMUNet
from cm_jax.objectives import ConsistencyDistillation, Denoising
from cm_jax.training.config import TrainConfig
from cm_jax.training.setup import make_parallelism, make_step
from cm_jax.training.step import Constants, StepBatch, image_keys
from cm_jax.types import normal_per_image, split_keys

CHECKED_STEPS = 3
"""Number of first steps in which all implementations get the same noise and their losses are compared."""
BOUND = 1e-4
"""Maximum relative difference of these losses."""
CM_JAX, EAGER, COMPILED, NCHW, CHANNELS_LAST = (
    "cm_jax",
    "PyTorch, eager",
    "PyTorch, compiled",
    "PyTorch, NCHW",
    "PyTorch, channels last",
)

AUTOTUNED = {"mode": "max-autotune-no-cudagraphs"}
"""Options of `torch.compile` on GPU; CUDA graphs do not help large batches."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table."""

    network: str
    method: str
    implementation: str
    config: TrainConfig


Step = Callable[[NoiseSample | None], float]
"""Performs a step, waits for it and returns the loss. PyTorch uses the given noise if any; cm_jax samples its own."""


def build_step(row: Row) -> Step:
    """Build the step of a row, with parameters and data on the device."""
    config, rng = row.config, np.random.default_rng(0)
    network: Any = config.network
    images = rng.integers(0, 256, (config.batch_size, *network.image_shape), np.uint8)
    labels = rng.integers(0, network.classes, config.batch_size, np.int32) if network.classes else None
    if row.implementation == CM_JAX:
        return JaxStep(config, images, labels)
    diffusers = row.implementation in (NCHW, CHANNELS_LAST) and isinstance(network, ADMUNet)
    model = (DiffusersADM if diffusers else TorchUNet)(network, random_params(network))
    return TorchStep(
        config,
        model,
        images,
        labels,
        device="cuda" if torch.cuda.is_available() else "cpu",
        layout=torch.contiguous_format if row.implementation == NCHW else torch.channels_last,
        compiled=row.implementation == COMPILED and (AUTOTUNED if torch.cuda.is_available() else {}),
    )


class JaxStep:
    """The compiled step of the training loop, applied to one fixed batch."""

    def __init__(self, config: TrainConfig, images: np.ndarray, labels: np.ndarray | None) -> None:
        kernels.keep_memory()  # as in every command
        params, parallelism = random_params(config.network), make_parallelism(config)
        teacher = None
        if config.objective.has_teacher:
            assert isinstance(config.preconditioning, LogSigmaPreconditioning)
            teacher = ConsistencyFunction(
                config.network, EDMPreconditioning(time_factor=config.preconditioning.time_factor)
            )
        training_step = make_step(config, teacher)
        self._state = parallelism.place_state(training_step.initial_state(params))
        prepared = teacher and teacher.network.prepare(params)
        self._constants = parallelism.place_constants(Constants(teacher=prepared))
        self._program: Any = parallelism.compile(functools.partial(training_step.run_steps, parallelism), self._state)
        self._batches = StepBatch(images[None], None if labels is None else labels[None])
        self._parallelism, self._key = parallelism, jax.random.key(config.seed)

    def __call__(self, sample: NoiseSample | None = None) -> float:
        del sample
        self._state, metrics = jax.block_until_ready(self._program(*self._arguments()))
        return float(metrics["loss"][0])

    def compiled(self) -> jax.stages.Compiled:
        """The compiled program, for inspection."""
        return self._program.lower(*self._arguments()).compile()

    def _arguments(self) -> tuple[Any, ...]:
        return self._state, self._constants, self._parallelism.place_batches(self._batches), self._key


def step_noise(config: TrainConfig, batch: int) -> NoiseSample:
    """The noise of the cm_jax step for batch number `batch`. Empty for methods without a PyTorch step."""
    objective: Any = config.objective
    if type(objective) not in (Denoising, ConsistencyDistillation):
        return NoiseSample(*[np.zeros(0, np.float32)] * 3)
    key_level, key_noise, _ = split_keys(image_keys(jax.random.key(config.seed), batch, np.arange(config.batch_size)))
    noise = np.asarray(normal_per_image(key_noise, config.network.image_shape))
    if not objective.has_teacher:
        t = np.asarray(objective.noise_distribution(key_level))
        return NoiseSample(t, np.zeros_like(t), noise)
    levels = objective.curriculum(batch)
    index = objective.noise_distribution(key_level, config.schedule, levels)
    t, r = (np.asarray(config.schedule.sigma(index + more, levels)) for more in (0, 1))
    return NoiseSample(t, r, noise)


@dataclasses.dataclass
class Measurement:
    """Measurements of a row."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """Losses of the checked steps."""
    first: float = 0.0
    """Seconds of the first step, including compilation."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Seconds of each step after the checked ones."""
    peak: float = 0.0
    """Peak memory in bytes."""
    failure: str = ""

    def difference(self, other: "Measurement") -> float:
        """Largest relative difference of the losses."""
        return float(np.abs(np.divide(self.losses, other.losses) - 1).max())


class Subprocess:
    """A row that runs in its own process. A failure is stored in `measurement`; other rows continue."""

    def __init__(self, row: Row, limit: float) -> None:
        """`limit` is the total time in seconds that the row may take."""
        context = multiprocessing.get_context("spawn")
        self.row, self.measurement, self._left = row, Measurement(), limit
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(row, child), daemon=True)
        self._process.start()
        child.close()

    def step(self, sample: NoiseSample | None = None) -> None:
        """Perform a step: a checked one if noise is given, else a timed one."""
        if self.measurement.failure:
            return
        began = time.perf_counter()
        try:
            self._connection.send(sample)
            answer = self._connection.recv() if self._connection.poll(self._left) else "time limit exceeded"
        except (EOFError, OSError):
            answer = "the process died"
        self._left -= time.perf_counter() - began
        if isinstance(answer, str):
            self.measurement.failure = answer
            return
        _record(self.measurement, sample, *answer)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class InProcess:
    """A row that runs in this process, for tiny networks."""

    def __init__(self, row: Row) -> None:
        self.row, self.measurement, self._step = row, Measurement(), None

    def step(self, sample: NoiseSample | None = None) -> None:
        self._step = self._step or build_step(self.row)
        began = time.perf_counter()
        loss = self._step(sample)
        _record(self.measurement, sample, time.perf_counter() - began, loss, float("nan"))

    def end(self) -> None:
        self._step = None


def _record(measurement: Measurement, sample: NoiseSample | None, seconds: float, loss: float, peak: float) -> None:
    """Add a step to the checked ones if noise was given, else to the timed ones."""
    measurement.peak = peak
    if sample is None:
        measurement.seconds.append(seconds)
    else:
        measurement.first = measurement.first or seconds
        measurement.losses.append(loss)


def measure(rows: list[Row], repeats: int, limit: float, *, in_process: bool = False) -> dict[Row, Measurement]:
    """Perform the checked steps, then `repeats` rounds of one timed step of each row."""
    processes = [InProcess(row) if in_process else Subprocess(row, limit) for row in rows]
    for process in processes:
        for batch in range(CHECKED_STEPS):
            process.step(step_noise(process.row.config, batch))
    _check([process for process in processes if not process.measurement.failure])
    for _ in range(repeats):
        for process in processes:
            process.step()
    for process in processes:
        process.end()
    return {process.row: process.measurement for process in processes}


def _check(processes: Sequence[Subprocess | InProcess]) -> None:
    """Exit if the same noise gave different losses, which makes the times incomparable."""
    for process in processes:
        row, found, reference = process.row, process.measurement, processes[0].measurement
        if not found.difference(reference) <= BOUND:
            sys.exit(f"{row.method}, {row.implementation}: expected losses {reference.losses}, got {found.losses}.")


def _serve(row: Row, connection: Connection) -> None:
    """Answer each request with (seconds, loss, peak memory), or with an error message."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision
    torch.backends.cudnn.benchmark = True  # selects the fastest convolutions
    before, step = process_memory("VmRSS"), None
    peak = functools.partial(peak_memory, before, jax_allocator=row.implementation == CM_JAX)
    try:
        while True:
            sample = connection.recv()
            step = step or build_step(row)
            began = time.perf_counter()
            loss = step(sample)
            connection.send((time.perf_counter() - began, loss, peak()))
    except EOFError:
        return
    except Exception as error:
        connection.send(failure(error))


def peak_memory(before: float, *, jax_allocator: bool) -> float:
    """Peak bytes of the JAX or PyTorch allocator on GPU; on CPU the peak of this process minus `before`."""
    if jax.default_backend() != "gpu":
        return process_memory("VmHWM") - before
    found = jax.devices()[0].memory_stats() if jax_allocator else None
    return found["peak_bytes_in_use"] if found else torch.cuda.max_memory_allocated()
