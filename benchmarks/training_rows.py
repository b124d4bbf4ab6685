"""The rows of step_time: a training step made ready and measured, ours or PyTorch's."""

import dataclasses
import functools
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.random_params import random_params
from benchmarks.torch_training import DiffusersADM, Drawn, TorchTraining
from benchmarks.torch_unet import TorchUNet
from cm_jax import kernels
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.preconditioning import EDMPreconditioning, LogSigmaPreconditioning
from cm_jax.networks import ADMUNet
from cm_jax.objectives import ConsistencyDistillation, Denoising
from cm_jax.objectives.base import split_keys
from cm_jax.training.config import TrainConfig
from cm_jax.training.state import Constants, RawBatch
from cm_jax.training.step import image_keys
from cm_jax.types import normal_per_image

CHECKED_STEPS = 3
"""Steps in which PyTorch gets our noise, and the losses must agree."""
BOUND = 1e-4
"""Largest relative difference of these losses."""
OURS, EAGER, COMPILED, NCHW, CHANNELS_LAST = (
    "ours",
    "PyTorch, eager",
    "PyTorch, compiled",
    "PyTorch, NCHW",
    "PyTorch, channels last",
)

AUTOTUNED = {"mode": "max-autotune-no-cudagraphs"}
"""How PyTorch compiles for a GPU: it tries everything, but for CUDA graphs, which large batches gain nothing from."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    network: str
    method: str
    step: str
    chosen: TrainConfig


Step = Callable[[Drawn | None], float]
"""Takes a step and returns its loss when all is done. PyTorch uses the draws if there are any; ours draws by itself."""


def begin(row: Row) -> Step:
    """The row's program with everything on its device."""
    chosen, rng = row.chosen, np.random.default_rng(0)
    network: Any = chosen.network
    images = rng.integers(0, 256, (chosen.batch_size, *network.image_shape), np.uint8)
    labels = rng.integers(0, network.classes, chosen.batch_size, np.int32) if network.classes else None
    if row.step == OURS:
        return Ours(chosen, images, labels)
    diffusers = row.step in (NCHW, CHANNELS_LAST) and isinstance(network, ADMUNet)
    model = (DiffusersADM if diffusers else TorchUNet)(network, random_params(network))
    return TorchTraining(
        chosen,
        model,
        images,
        labels,
        device="cuda" if torch.cuda.is_available() else "cpu",
        layout=torch.contiguous_format if row.step == NCHW else torch.channels_last,
        compiled=row.step == COMPILED and (AUTOTUNED if torch.cuda.is_available() else {}),
    )


class Ours:
    """The program that the training loop runs, on the same batch again and again."""

    def __init__(self, chosen: TrainConfig, images: np.ndarray, labels: np.ndarray | None) -> None:
        kernels.keep_memory()  # as all commands do
        params, across = random_params(chosen.network), chosen.parallelism()
        teacher = None
        if chosen.objective.has_teacher:
            assert isinstance(chosen.preconditioning, LogSigmaPreconditioning)
            teacher = ConsistencyFunction(
                chosen.network, EDMPreconditioning(time_factor=chosen.preconditioning.time_factor)
            )
        training_step = chosen.step(teacher)
        self._state = across.place_state(training_step.initial(params))
        prepared = teacher and teacher.network.prepare(params)
        self._constants = across.place_constants(Constants(teacher=prepared))
        self._program: Any = across.compile(functools.partial(training_step.many, across), self._state, self._constants)
        self._batches = RawBatch(images[None], None if labels is None else labels[None])
        self._across, self._key = across, jax.random.key(chosen.seed)

    def __call__(self, drawn: Drawn | None = None) -> float:
        del drawn
        self._state, metrics = jax.block_until_ready(self._program(*self._arguments()))
        return float(metrics["loss"][0])

    def compiled(self) -> jax.stages.Compiled:
        """The program again, to be read."""
        return self._program.lower(*self._arguments()).compile()

    def _arguments(self) -> tuple[Any, ...]:
        return self._state, self._constants, self._across.place_batches(self._batches), self._key


def draws_of_ours(chosen: TrainConfig, batch: int) -> Drawn:
    """What our step draws for batch number `batch`: by EDM and CD, which PyTorch has too; else nothing much."""
    objective: Any = chosen.objective
    if type(objective) not in (Denoising, ConsistencyDistillation):
        return Drawn(*[np.zeros(0, np.float32)] * 3)
    keys = split_keys(image_keys(jax.random.key(chosen.seed), batch, np.arange(chosen.batch_size)))
    noise = np.asarray(normal_per_image(keys.noise, chosen.network.image_shape))
    if not objective.has_teacher:
        t = np.asarray(objective.noise_distribution(keys.level))
        return Drawn(t, np.zeros_like(t), noise)
    levels = objective.curriculum(batch)
    index = objective.noise_distribution(keys.level, objective.curve, levels)
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


class Process:
    """A row in a process of its own, which takes steps when told. Where it fails its row says why, and others go on."""

    def __init__(self, row: Row, limit: float) -> None:
        """`limit`: seconds that all it does may take together."""
        context = multiprocessing.get_context("spawn")
        self.row, self.measured, self._left = row, Measured(), limit
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(row, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def step(self, drawn: Drawn | None = None) -> None:
        """One step, of the checked ones where there are draws."""
        if self.measured.failure:
            return
        began = time.perf_counter()
        try:
            self._connection.send(drawn)
            answer = self._connection.recv() if self._connection.poll(self._left) else "it took too long"
        except (EOFError, OSError):
            answer = "its process died"
        self._left -= time.perf_counter() - began
        if isinstance(answer, str):
            self.measured.failure = answer
            return
        _entered(self.measured, drawn, *answer)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class Here:
    """A row in this process, for networks so small that starting another takes longer than their steps."""

    def __init__(self, row: Row) -> None:
        self.row, self.measured, self._step = row, Measured(), None

    def step(self, drawn: Drawn | None = None) -> None:
        self._step = self._step or begin(self.row)
        began = time.perf_counter()
        loss = self._step(drawn)
        _entered(self.measured, drawn, time.perf_counter() - began, loss, float("nan"))

    def end(self) -> None:
        self._step = None


def _entered(measured: Measured, drawn: Drawn | None, seconds: float, loss: float, peak: float) -> None:
    """A step among the checked ones, where there are draws, or the timed ones."""
    measured.peak = peak
    if drawn is None:
        measured.seconds.append(seconds)
    else:
        measured.first = measured.first or seconds
        measured.losses.append(loss)


def measure(rows: list[Row], repeats: int, limit: float, *, here: bool = False) -> dict[Row, Measured]:
    """The checked steps, then `repeats` rounds of one step of each row in turn; `here`: in this process."""
    processes = [Here(row) if here else Process(row, limit) for row in rows]
    for process in processes:
        for batch in range(CHECKED_STEPS):
            process.step(draws_of_ours(process.row.chosen, batch))
    _check([process for process in processes if not process.measured.failure])
    for _ in range(repeats):
        for process in processes:
            process.step()
    for process in processes:
        process.end()
    return {process.row: process.measured for process in processes}


def _check(processes: Sequence[Process | Here]) -> None:
    """End the program where the same noise gave other losses: the times would not be of the same work."""
    for process in processes:
        row, found, reference = process.row, process.measured, processes[0].measured
        if not found.difference(reference) <= BOUND:
            sys.exit(f"{row.method}, {row.step}: the losses are {found.losses} and should be {reference.losses}.")


def _serve(row: Row, connection: Connection) -> None:
    """Answer every request with seconds, loss and the process's peak of memory; or with what went wrong."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    torch.backends.cudnn.benchmark = True  # it takes its fastest convolutions
    before, step = resident("VmRSS"), None
    try:
        while True:
            drawn = connection.recv()
            step = step or begin(row)
            began = time.perf_counter()
            loss = step(drawn)
            connection.send((time.perf_counter() - began, loss, _peak(row, before)))
    except EOFError:
        return
    except Exception as error:
        lines = str(error).strip().splitlines()
        connection.send(f"{type(error).__name__}: {lines[0][:120] if lines else ''}")


def _peak(row: Row, before: float) -> float:
    """Bytes: on a GPU by its own count, on a CPU what came on top of `before`."""
    if jax.default_backend() != "gpu":
        return resident("VmHWM") - before
    found = jax.devices()[0].memory_stats() if row.step == OURS else None
    return found["peak_bytes_in_use"] if found else torch.cuda.max_memory_allocated()


def resident(what: str) -> float:
    """Bytes of this process by Linux's count; NaN elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{what}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else float("nan")
