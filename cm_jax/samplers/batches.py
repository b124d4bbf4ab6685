"""Functions of many images, computed in batches that the devices of this process share."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from cm_jax.parallelism import ImageFunction, Parallelism, Tree, choose_for_images, compiled_over_images
from cm_jax.progress import activity


def in_batches(
    function: ImageFunction,
    static: tuple[Any, ...],
    shared: tuple[Any, ...],
    batches: Iterable[tuple[int, tuple[Tree, ...]]],
    parallelism: Parallelism,
    *,
    name: str,
    ahead: int = 0,
) -> Iterator[Tree]:
    """The results of function(*static, *shared, *rows) for each batch, on the host.

    `batches`: the number of images in a batch, and the per-image arguments, padded so that all batches have the same
    size, a multiple of the number of devices. Results of the padding are dropped. `name`: for the message
    while it is compiled, such as "the sampler". `ahead`: batches that the devices compute before the host takes a
    result.
    """
    program, shared = compiled_over_images(function, parallelism), parallelism.place_constants(shared)

    def fetch(count: int, result: Tree) -> Tree:
        return jax.tree.map(lambda array: array[:count], parallelism.fetch(result))

    def starts() -> Iterator[tuple[int, Tree]]:
        for number, (count, rows) in enumerate(batches):
            if number:
                yield count, program(static, shared, rows)
                continue
            with activity(f"Compiling {name}", "usually 5 to 60 s"):
                first = program(static, shared, rows)
            yield count, first

    started = starts()
    waiting = list(itertools.islice(started, ahead))
    for new in started:
        waiting.append(new)
        yield fetch(*waiting.pop(0))
    for rest in waiting:
        yield fetch(*rest)


def by_number(
    function: ImageFunction,
    static: tuple[Any, ...],
    shared: tuple[Any, ...],
    rows: Callable[[Int[np.ndarray, " b"]], tuple[Tree, ...]],
    count: int,
    batch_size: int,
    parallelism: Parallelism | None = None,
    *,
    name: str,
    first: int = 0,
) -> Iterator[Tree]:
    """The results for images first ... count - 1, of which rows(numbers) are the per-image arguments, in batches.

    `batch_size`: images per batch on all devices of `parallelism` (default: `choose_for_images`), rounded up to a
    multiple of their number. The last batch is padded with its last image. `name`: as in `in_batches`.
    """
    parallelism = parallelism or choose_for_images()
    size = multiple_of(len(parallelism.devices), max(1, min(batch_size, count - first)))
    numbers = ((start, np.minimum(np.arange(start, start + size), count - 1)) for start in range(first, count, size))
    batches = ((min(size, count - start), rows(chosen)) for start, chosen in numbers)
    return in_batches(function, static, shared, batches, parallelism, name=name)


def multiple_of(devices: int, batch_size: int) -> int:
    """The batch size, rounded up to a multiple of the number of devices."""
    return -(-batch_size // devices) * devices
