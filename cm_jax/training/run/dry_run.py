"""What a run would do: its shapes, memory and operations, from the compiled step, without running it."""

from collections.abc import Iterator
from typing import Any

import jax

from cm_jax import kernels
from cm_jax.training.setup import Prepared
from cm_jax.training.state import RawBatch


def report(run: Prepared) -> Iterator[str]:
    """Lines for the user."""
    chosen, network = run.settings, run.settings.network
    devices = run.across.devices
    state, constants = run.abstract_state(), run.constants()
    images = chosen.batch_size * chosen.steps_per_dispatch
    yield f"data        {run.dataset.description}" + (", kept on the devices" if run.resident else "")
    yield f"objective   {type(chosen.objective).__name__}"
    yield f"network     {type(network).__name__}, {network.parameter_count():,} parameters, {network.precision}"
    yield f"images      {'x'.join(map(str, network.image_shape))}, {network.classes or 'no'} classes"
    way = type(run.across).__name__
    yield f"batch       {chosen.batch_size} images over {len(devices)} x {devices[0].device_kind} ({way})"
    yield f"length      {chosen.batches:,} batches, {chosen.batches * chosen.batch_size:,} images"
    yield from (f"            {line}" for line in chosen.unfinished())
    if run.evaluator is not None:
        yield f"evaluation  {run.evaluator.description}"
    parts = {name: _bytes(getattr(state, name)) for name in ("params", "optimizer", "target", "teacher", "averages")}
    parts["constants"] = _bytes(constants)
    yield "memory      " + ", ".join(f"{name} {_shown(size)}" for name, size in parts.items() if size)

    first = next(run.dispatches(0, chosen.batches))
    batches: RawBatch = run.across.place_batches(first)
    program: Any = run.compiled(constants)
    compiled = program.lower(state, constants, batches, jax.random.key(0)).compile()
    found = compiled.memory_analysis()
    if found is not None:
        yield f"            the compiled step needs {_shown(found.temp_size_in_bytes)} more on a device"
    with kernels.off():  # XLA does not count what is done outside of it
        lowered: Any = run.compiled(constants)
        costs = lowered.lower(state, constants, batches, jax.random.key(0)).cost_analysis()
    costs = costs or compiled.cost_analysis() or {}  # the first is not to be had on GPUs
    costs = costs[0] if isinstance(costs, list) else costs
    if costs.get("flops", 0) > 0:
        total = costs["flops"] * len(devices)
        each = f"{total / chosen.steps_per_dispatch:.3g} FLOP a step, {total / images:.3g} an image"
        yield f"operations  {each}, by the compiler's count"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
