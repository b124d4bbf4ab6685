"""What training steps and functions of images know of the devices, and OneDevice."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Int

from cm_jax.types import Params

Tree = Any
Step = Callable[..., tuple[Any, dict[str, Array]]]
"""(state, constants, batches, key) -> (state, metrics); batches [steps, b, ...]."""
ImageFunction = Callable[..., Tree]
"""function(*static, *shared, *rows): hashable constants, arrays for all images, one row for each image -> rows."""
ImageProgram = Callable[[tuple[Any, ...], Tree, tuple[Tree, ...]], Tree]
"""(static, shared, rows) -> rows on the devices, for `Parallelism.fetch`."""


class Parallelism(abc.ABC):
    """Collectives of a step, placement of arrays, and compilation."""

    @property
    @abc.abstractmethod
    def within_process(self) -> "Parallelism":
        """The same over the devices of this process, for functions of images."""

    @property
    @abc.abstractmethod
    def devices(self) -> Sequence[Any]: ...

    @property
    @abc.abstractmethod
    def replicated(self) -> Sharding:
        """Sharding of an array that every device holds."""

    # Inside the compiled step
    def scan(self, function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, items: Any) -> tuple[Any, Any]:
        """jax.lax.scan; unrolled on CPUs, where XLA does not use its fast convolutions in loops (20 times slower)."""
        if self.devices[0].platform != "cpu":
            return jax.lax.scan(function, carry, items)
        results = []
        for index in range(len(jax.tree.leaves(items)[0])):
            carry, result = function(carry, jax.tree.map(lambda item, index=index: item[index], items))
            results.append(result)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    def image_indices(self, count: int) -> Int[Array, " b"]:
        """Indices in the global batch of this device's `count` images."""
        return jnp.arange(count)

    def mean(self, tree: Any) -> Any:
        """Mean over devices of means over each device's images."""
        return tree

    def gather(self, params: Params | None) -> Any:
        """Full parameters for the network."""
        return params

    def shard(self, params: Params) -> Any:
        """Parameters or gradients as the optimizer stores them."""
        return params

    # Functions of images
    @abc.abstractmethod
    def over_images(self, function: ImageFunction) -> ImageProgram:
        """A program that splits rows, a multiple of the number of devices, among the devices, of this process."""

    def fetch(self, result: Tree) -> Tree:
        """The rows of a result on the host."""
        return jax.tree.map(np.asarray, result)

    # Training steps
    @abc.abstractmethod
    def compile(self, step: Step, state: Any) -> Step:
        """The step for states like `state`, compiled at the first call; its state argument is donated."""

    def shardings(self, state: Any) -> Any:
        """Sharding of each leaf of a state or of its shapes."""
        return jax.tree.map(lambda _: self.replicated, state)

    def place_state(self, state: Any) -> Any:
        """Copies on the devices, which the step may donate; one leaf after the other, to save memory."""

        def place(leaf: Any, where: Sharding) -> Array:
            return jax.block_until_ready(jnp.copy(global_array(leaf, where)))

        return jax.tree.map(place, state, self.shardings(state))

    def place_constants(self, constants: Any) -> Any:
        return jax.tree.map(lambda leaf: global_array(leaf, self.replicated), constants)

    @abc.abstractmethod
    def place_batches(self, batches: Any) -> Any:
        """This process's share of each batch, NumPy arrays [steps, b, ...], on the devices."""


@dataclasses.dataclass(frozen=True)
class OneDevice(Parallelism):
    """jax.jit on the first local device."""

    @property
    def devices(self) -> Sequence[Any]:
        return jax.local_devices()[:1]

    @property
    def within_process(self) -> Parallelism:
        return self

    @property
    def replicated(self) -> Sharding:
        return SingleDeviceSharding(self.devices[0])

    def over_images(self, function: ImageFunction) -> ImageProgram:
        return jax.jit(grouped(function), static_argnums=0)

    def compile(self, step: Step, state: Any) -> Step:
        return jax.jit(step, donate_argnums=0)

    def place_batches(self, batches: Any) -> Any:
        return jax.device_put(batches, self.replicated)


def global_array(array: Any, where: Sharding) -> Array:
    """Place an array, of which every process has the whole, on the devices of all processes."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def grouped(function: ImageFunction) -> ImageProgram:
    """The function, with its arguments in groups, and its name."""

    def program(static: tuple[Any, ...], shared: Tree, rows: tuple[Tree, ...]) -> Tree:
        return function(*static, *shared, *rows)

    program.__name__ = function.__name__
    return program
