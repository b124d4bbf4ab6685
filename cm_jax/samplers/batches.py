"""Functions of many images, computed in batches that all local devices share."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from cm_jax.progress import activity

Tree = Any
"""A tree of arrays whose first axis is that of images."""


class Programs(NamedTuple):
    """One function, named for progress messages, compiled for one device and for several that share the images."""

    name: str

    one: Callable[..., Tree]
    many: Callable[..., Tree]


def compile_programs(function: Callable[..., Tree], name: str) -> Programs:
    """Compile function(*static, *shared, *rows): hashable constants, arrays for all images, one row for each image.

    name: for the message while it is compiled, such as "the sampler".
    """

    def program(static: tuple[Any, ...], shared: tuple[Any, ...], rows: tuple[Tree, ...]) -> Tree:
        return function(*static, *shared, *rows)

    program.__name__ = function.__name__
    many = jax.pmap(program, axis_name="devices", in_axes=(None, None, 0), static_broadcasted_argnums=0)
    return Programs(name, jax.jit(program, static_argnums=0), many)


def in_batches(
    programs: Programs,
    static: tuple[Any, ...],
    shared: tuple[Any, ...],
    batches: Iterable[tuple[int, tuple[Tree, ...]]],
    devices: Sequence[Any],
    *,
    ahead: int = 0,
) -> Iterator[Tree]:
    """The results for each batch, on the host.

    `batches`: the number of images in a batch, and the per-image arguments, padded so that all batches have the same
    size, a multiple of the number of devices. Results of the padding are dropped. `ahead`: batches that the devices
    compute before the host takes a result.
    """
    if len(devices) > 1:
        shared = jax.device_put(shared, NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec()))

    def start(batch: tuple[int, tuple[Tree, ...]]) -> tuple[int, Tree]:
        count, arrays = batch
        if len(devices) == 1:
            return count, programs.one(static, shared, arrays)
        parts = jax.tree.map(lambda a: a.reshape(len(devices), -1, *a.shape[1:]), arrays)
        return count, programs.many(static, shared, parts)

    def fetch(count: int, result: Tree) -> Tree:
        axes = min(len(devices), 2)
        return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[axes:])[:count], result)

    def starts() -> Iterator[tuple[int, Tree]]:
        for number, batch in enumerate(batches):
            if number:
                yield start(batch)
                continue
            with activity(f"Compiling {programs.name}", "usually 5 to 60 s"):
                first = start(batch)
            yield first

    started = starts()
    waiting = list(itertools.islice(started, ahead))
    for new in started:
        waiting.append(new)
        yield fetch(*waiting.pop(0))
    for rest in waiting:
        yield fetch(*rest)


def by_number(
    programs: Programs,
    static: tuple[Any, ...],
    shared: tuple[Any, ...],
    rows: Callable[[Int[np.ndarray, " b"]], tuple[Tree, ...]],
    count: int,
    batch_size: int,
    devices: Sequence[Any] | None = None,
) -> Iterator[Tree]:
    """The results for images 0 ... count - 1, of which rows(numbers) are the per-image arguments, in batches.

    `batch_size`: images per batch on all `devices` (default: all local devices), rounded up to a multiple of their
    number. The last batch is padded with its last image.
    """
    devices = list(devices or jax.local_devices())
    size = multiple_of(devices, min(batch_size, count))
    numbers = ((start, np.minimum(np.arange(start, start + size), count - 1)) for start in range(0, count, size))
    batches = ((min(size, count - start), rows(chosen)) for start, chosen in numbers)
    return in_batches(programs, static, shared, batches, devices)


def multiple_of(devices: Sequence[Any], batch_size: int) -> int:
    """The batch size, rounded up to a multiple of the number of devices."""
    return -(-batch_size // len(devices)) * len(devices)
