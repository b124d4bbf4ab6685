"""Dry run: sizes, memory and FLOPs of a run from the compiled step, without running it."""

from collections.abc import Iterator
from typing import Any

import jax

from cm_jax import kernels
from cm_jax.progress import activity
from cm_jax.training.schedules import outrun_schedules, unfinished_schedules
from cm_jax.training.setup import COMPILING, TrainingSetup
from cm_jax.training.step import StepBatch
from cm_jax.types import parameter_count

_COMPONENTS = ("params", "optimizer", "target", "teacher", "ema")


def report(setup: TrainingSetup) -> Iterator[str]:
    """Lines for the user."""
    config, network = setup.config, setup.config.network
    devices = setup.parallelism.devices
    state, constants = setup.abstract_state(), setup.constants()
    yield f"data        {setup.dataset.description}" + (", copied to the devices" if setup.resident else "")
    yield f"objective   {type(config.objective).__name__}"
    count = parameter_count(network.shapes())
    yield f"network     {type(network).__name__}, {count:,} parameters, {network.precision}"
    yield f"images      {'x'.join(map(str, network.image_shape))}, {network.classes or 'no'} classes"
    parallelism = type(setup.parallelism).__name__
    yield f"batch       {config.batch_size} images over {len(devices)} x {devices[0].device_kind} ({parallelism})"
    yield f"length      {config.batches:,} batches, {config.images_after(config.batches):,} images"
    yield from (f"            {line}" for line in (*unfinished_schedules(config), *outrun_schedules(config)))
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

    with activity(*COMPILING):
        compiled = lowered().compile()
    if (memory := compiled.memory_analysis()) is not None:
        yield f"            the compiled step needs {_readable(memory.temp_size_in_bytes)} more per device"
    with kernels.off(), activity("Counting operations"):  # XLA does not count the FLOPs of custom calls
        costs = lowered().cost_analysis()
    costs = costs or compiled.cost_analysis() or {}  # on GPUs only the compiled program has them
    if (flops := costs.get("flops", 0) * len(devices) / config.steps_per_dispatch) > 0:
        per_image = flops / config.batch_size
        yield f"operations  {flops:.3g} FLOP per step, {per_image:.3g} per image (estimated by XLA)"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
