"""Dry run: sizes, memory and FLOPs of a run from its shapes and its compiled step, without running it.

The checkpoint and the data that a preset names need not be there: shapes stand in for them.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from cm_jax import kernels
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import Source
from cm_jax.data import Batches, Dataset, RawBatch
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_path
from cm_jax.networks import AnyNetwork
from cm_jax.progress import activity
from cm_jax.training.config import TrainConfig
from cm_jax.training.inputs import Inputs
from cm_jax.training.schedules import outrun_schedules, slow_target, unfinished_schedules
from cm_jax.training.setup import COMPILING, TrainingSetup, prepare
from cm_jax.training.step import Constants, StepBatch
from cm_jax.types import Params, parameter_count

_COMPONENTS = ("params", "optimizer", "target", "teacher", "ema")


def dry_run(config: TrainConfig, preset: TrainConfig) -> Iterator[str]:
    """Lines for the user. What `config` has from its preset may be missing. Raises InputError as `prepare`."""
    inputs = StandIns(preset)
    setup = prepare(config, inputs=inputs)
    yield from report(setup)
    yield from (f"note        {note}" for note in inputs.notes)


class StandIns(Inputs):
    """The inputs of a run, with stand-ins for the missing ones that its preset names."""

    def __init__(self, preset: TrainConfig) -> None:
        self.notes: list[str] = []
        """What is missing, and what is assumed."""
        self._preset = preset

    def checkpoint(self, config: TrainConfig, field: Literal["teacher", "init_from"]) -> Source:
        """The checkpoint, or a denoiser with the network of the preset, with shapes in place of parameters."""
        name, preset = getattr(config, field), self._preset
        try:
            return super().checkpoint(config, field)
        except InputError:
            if name != getattr(preset, field) or user_path(name).exists():
                raise
        self.notes.append(f"{name} is not here: its network is assumed to be that of the preset.")
        plain = {"dropout": 0.0, "interval_embedding": False, "guidance_embedding": False}
        own: Any = preset.network
        network = dataclasses.replace(own, **plain)
        factor = getattr(preset.preconditioning, "time_factor", EDMPreconditioning.time_factor)
        found = ModelConfig(network, EDMPreconditioning(time_factor=factor), preset.schedule)
        return Source(Path(name), found, network.shapes())

    def data(self, config: TrainConfig, inherited: bool = False) -> Dataset:
        """The data, or black images of the network's shape."""
        try:
            return super().data(config, inherited)
        except InputError as error:
            if config.data != self._preset.data:
                raise
            self.notes.append(f"The data are not here: {str(error).partition(chr(10))[0]}")
            return _BlackImages(type(config.data).__name__, config.network)


class _BlackImages(Dataset):
    """Black images of label 0, streamed."""

    def __init__(self, place: str, network: AnyNetwork) -> None:
        super().__init__(place, 1, network.image_shape, network.classes, (), "")
        self.description = f"{place}, which is not here"

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        count = len(range(batch_size)[rows])
        labels = None if self.classes is None else np.zeros(count, np.int32)
        while True:
            yield RawBatch(np.zeros((count, *self.image_shape), np.uint8), labels)

    def _renumber(self, order: np.ndarray) -> None: ...


def report(setup: TrainingSetup) -> Iterator[str]:
    """Lines for the user."""
    config, network = setup.config, setup.config.network
    devices = setup.parallelism.devices
    state, constants = setup.abstract_state(), _abstract_constants(setup)
    yield f"data        {setup.dataset.description}" + (", copied to the devices" if setup.resident else "")
    yield f"objective   {type(config.objective).__name__}"
    count = parameter_count(network.shapes())
    yield f"network     {type(network).__name__}, {count:,} parameters, {network.precision}"
    yield f"images      {'x'.join(map(str, network.image_shape))}, {network.classes or 'no'} classes"
    parallelism = type(setup.parallelism).__name__
    yield f"batch       {config.batch_size} images over {len(devices)} x {devices[0].device_kind} ({parallelism})"
    yield f"length      {config.batches:,} batches, {config.images_after(config.batches):,} images"
    warnings = (*unfinished_schedules(config), *outrun_schedules(config), *slow_target(config))
    yield from (f"            {line}" for line in warnings)
    yield from (f"note        {note}" for note in setup.notes)
    if config.snapshot_note:
        yield f"disk        {config.snapshot_note}"
    if setup.evaluator is not None:
        yield f"evaluation  {setup.evaluator.description}"
    sizes = {name: _bytes(getattr(state, name)) for name in _COMPONENTS} | {"constants": _bytes(constants)}
    yield "memory      " + ", ".join(f"{name} {_readable(size)}" for name, size in sizes.items() if size)

    batches: StepBatch = setup.parallelism.place_batches(next(setup.dispatches(0, config.batches)))

    def lowered() -> Any:
        program: Any = setup.compiled()
        return program.lower(state, constants, batches, jax.random.key(0))

    def operations(costs: dict[str, float] | None) -> Iterator[str]:
        if (flops := (costs or {}).get("flops", 0) * len(devices) / config.steps_per_dispatch) > 0:
            per_image = flops / config.batch_size
            yield f"operations  {flops:.3g} FLOP per step, {per_image:.3g} per image (estimated by XLA)"

    with kernels.off(), activity("Counting operations", "usually 5 to 60 s"):  # XLA does not count custom calls
        costs = lowered().cost_analysis()
    yield from operations(costs)
    with activity(*COMPILING):
        compiled = lowered().compile()
    if (memory := compiled.memory_analysis()) is not None:
        yield f"compiled    the step needs {_readable(memory.temp_size_in_bytes)} more memory per device"
    if not costs:  # on GPUs only the compiled program has them
        yield from operations(compiled.cost_analysis())


def _abstract_constants(setup: TrainingSetup) -> Constants:
    """Shapes, dtypes and shardings of the constants."""

    def constants(teacher: Params | None) -> Constants:
        source = setup.teacher and dataclasses.replace(setup.teacher, params=teacher)
        return dataclasses.replace(setup, teacher=source).host_constants()

    shapes = jax.eval_shape(constants, setup.teacher and setup.teacher.params)
    return jax.tree.map(lambda leaf: leaf.update(sharding=setup.parallelism.replicated), shapes)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
