"""The rows of step_time: a training step made ready and measured, ours or PyTorch's."""

import dataclasses
import functools
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.random_params import random_params
from benchmarks.torch_adm import TorchADM
from benchmarks.torch_training import DiffusersADM, Drawn, TorchTraining
from cm_jax.arrays import normal_per_image
from cm_jax.consistency_function import ConsistencyFunction
from cm_jax.objectives.base import draws
from cm_jax.preconditioning import EDMScaling, VarianceScaling
from cm_jax.training.state import Constants, RawBatch
from cm_jax.training.step import image_keys
from cm_jax.training.training import Training

CHECKED_STEPS = 3
"""Steps in which PyTorch gets our noise, and the losses must agree."""
OURS, EAGER, COMPILED, NCHW, CHANNELS_LAST = (
    "ours",
    "PyTorch, eager",
    "PyTorch, compiled",
    "PyTorch, NCHW",
    "PyTorch, channels last",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    network: str
    method: str
    step: str
    chosen: Training


Step = Callable[[Drawn | None], float]
"""Takes a step and returns its loss when all is done. PyTorch uses the draws if there are any; ours draws by itself."""


def begin(row: Row) -> Step:
    """The row's program with everything on its device."""
    chosen, rng = row.chosen, np.random.default_rng(0)
    network: Any = chosen.network
    images = rng.integers(0, 256, (chosen.batch_size, *network.image_shape), np.uint8)
    labels = rng.integers(0, network.classes, chosen.batch_size, np.int32) if network.classes else None
    if row.step == OURS:
        return ours(chosen, images, labels)
    diffusers = row.step in (NCHW, CHANNELS_LAST)
    model = (DiffusersADM if diffusers else TorchADM)(network, random_params(network))
    return TorchTraining(
        chosen,
        model,
        images,
        labels,
        device="cuda" if torch.cuda.is_available() else "cpu",
        layout=torch.contiguous_format if row.step == NCHW else torch.channels_last,
        compiled=row.step == COMPILED,
    )


def ours(chosen: Training, images: np.ndarray, labels: np.ndarray | None) -> Step:
    """The program that the training loop runs, on the same batch again and again."""
    params, across = random_params(chosen.network), chosen.parallelism()
    teacher = None
    if chosen.objective.has_teacher:
        assert isinstance(chosen.scaling, VarianceScaling)
        teacher = ConsistencyFunction(chosen.network, EDMScaling(time_factor=chosen.scaling.time_factor))
    training_step = chosen.step(teacher)
    state = across.place_state(training_step.initial(params))
    constants = across.place_constants(Constants(teacher=teacher and teacher.network.prepare(params)))
    program = across.compile(functools.partial(training_step.many, across), state, constants)
    batches = RawBatch(images[None], None if labels is None else labels[None])
    key = jax.random.key(chosen.seed)

    def step(drawn: Drawn | None = None) -> float:
        del drawn
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, constants, across.place_batches(batches), key))
        return float(metrics["loss"][0])

    return step


def draws_of_ours(chosen: Training, batch: int) -> Drawn:
    """What our step draws for batch number `batch`, for EDM and CD."""
    objective: Any = chosen.objective
    keys = draws(image_keys(jax.random.key(chosen.seed), batch, np.arange(chosen.batch_size)))
    noise = np.asarray(normal_per_image(keys.noise, chosen.network.image_shape))
    if not objective.has_teacher:
        t = np.asarray(objective.law(keys.level))
        return Drawn(t, np.zeros_like(t), noise)
    levels = objective.curriculum(batch)
    index = objective.law(keys.level, objective.curve, levels)
    t, r = (np.asarray(objective.curve.sigma(index + more, levels)) for more in (0, 1))
    return Drawn(t, r, noise)


@dataclasses.dataclass
class Measured:
    """What a row did."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the first steps, where the noise is ours."""
    first: float = 0.0
    """Seconds of the first step, with compilation."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of every step after those."""
    peak: float = 0.0
    """Bytes."""
    failure: str = ""

    def difference(self, other: "Measured") -> float:
        """Largest relative difference of losses."""
        return float(np.abs(np.divide(self.losses, other.losses) - 1).max())


def start(row: Row, step: Step) -> Measured:
    """The first steps."""
    measured = Measured()
    for batch in range(CHECKED_STEPS):
        drawn = None if row.step == OURS else draws_of_ours(row.chosen, batch)
        began = time.perf_counter()
        measured.losses.append(step(drawn))
        measured.first = measured.first or time.perf_counter() - began
    return measured


def time_steps(steps: dict[Row, Step], measured: dict[Row, Measured], repeats: int) -> None:
    """`repeats` rounds of one step each."""
    for _ in range(repeats):
        for row, step in steps.items():
            began = time.perf_counter()
            step(None)
            measured[row].seconds.append(time.perf_counter() - began)


def alone(row: Row, repeats: int) -> Measured:
    """The row in this process, and the process's peak of memory: on a GPU its own count, else what was added."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    before = _resident("VmRSS")
    try:
        step = begin(row)
        measured = start(row, step)
        time_steps({row: step}, {row: measured}, repeats)
    except Exception as error:  # out of memory, or no compiler: its row says so, and the others go on
        lines = str(error).strip().splitlines()
        return Measured(failure=f"{type(error).__name__}: {lines[0][:120] if lines else ''}")
    if jax.default_backend() == "gpu":
        found = jax.devices()[0].memory_stats() if row.step == OURS else None
        measured.peak = found["peak_bytes_in_use"] if found else torch.cuda.max_memory_allocated()
    else:
        measured.peak = _resident("VmHWM") - before
    return measured


def _resident(what: str) -> float:
    """Bytes of this process by Linux's count; NaN elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{what}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else float("nan")


def _send(row: Row, repeats: int, connection: Connection) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    connection.send(alone(row, repeats))


def alone_in_a_process(row: Row, repeats: int, limit: float) -> Measured:
    """`alone` in a process of its own, which is ended after `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(row, repeats, sending), daemon=True)
    process.start()
    sending.close()
    try:
        return receiving.recv() if receiving.poll(limit) else Measured(failure=f"not done after {limit:.0f} s")
    except EOFError:
        return Measured(failure="its process died")
    finally:
        process.kill()
        process.join()
