"""One training step on one or many devices, with equal results up to rounding: OneDevice, Pmap or Sharded.

The random numbers of an image depend on its index in the global batch, not on its device.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int

from cm_jax.errors import InputError
from cm_jax.types import Params

AXIS = "devices"
_LEAST_SHARDED = 4096
"""Arrays with fewer elements are replicated."""

Step = Callable[..., tuple[Any, dict[str, Array]]]
"""(state, constants, batches, key) -> (state, metrics); batches [steps, b, ...]."""


class Parallelism(abc.ABC):
    """Collectives of a step, placement of arrays, and compilation."""

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

    # Outside
    @abc.abstractmethod
    def compile(self, step: Step, state: Any) -> Step:
        """The step for states like `state`, compiled at the first call; its state argument is donated."""

    def shardings(self, state: Any) -> Any:
        """Sharding of each leaf of a state or of its shapes."""
        return jax.tree.map(lambda _: self.replicated, state)

    def place_state(self, state: Any) -> Any:
        """Copies on the devices, which the step may donate."""
        return jax.tree.map(jnp.copy, _global(state, self.shardings(state)))

    def place_constants(self, constants: Any) -> Any:
        return _global(constants, jax.tree.map(lambda _: self.replicated, constants))

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
    def replicated(self) -> Sharding:
        return SingleDeviceSharding(self.devices[0])

    def compile(self, step: Step, state: Any) -> Step:
        return jax.jit(step, donate_argnums=0)

    def place_batches(self, batches: Any) -> Any:
        return jax.device_put(batches, self.replicated)


@dataclasses.dataclass(frozen=True)
class _MultiDevice(Parallelism):
    """Base of the parallelisms over many devices."""

    count: int | None = None
    """Number of devices; None: all devices of all processes."""

    @property
    def devices(self) -> Sequence[Any]:
        return jax.devices()[: self.count]

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Pmap(_MultiDevice):
    """jax.pmap over the local devices of every process: the state is replicated, and gradients are averaged once."""

    def image_indices(self, count: int) -> Int[Array, " b"]:
        return jax.lax.axis_index(AXIS) * count + jnp.arange(count)

    def mean(self, tree: Any) -> Any:
        return jax.lax.pmean(tree, AXIS)

    def compile(self, step: Step, state: Any) -> Step:
        axes: Any = (None, None, 0, None)
        devices = None if self.count is None else self.devices
        return jax.pmap(step, AXIS, in_axes=axes, out_axes=axes[:2], donate_argnums=0, devices=devices)

    def place_batches(self, batches: Any) -> Any:
        here = sum(device.process_index == jax.process_index() for device in self.devices)

        def split(array: np.ndarray) -> np.ndarray:
            steps, images, *rest = array.shape
            return np.moveaxis(array.reshape(steps, here, images // here, *rest), 1, 0)

        return jax.tree.map(split, batches)


@dataclasses.dataclass(frozen=True)
class Sharded(_MultiDevice):
    """jax.jit over a mesh with one axis. The batch is split, and of each leaf of the state the largest divisible axis.

    Parameters are gathered for the network; gradients are reduced into the shards, where the optimizer runs.
    """

    def image_indices(self, count: int) -> Int[Array, " b"]:
        return jax.lax.with_sharding_constraint(jnp.arange(count), NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def gather(self, params: Params | None) -> Any:
        return jax.lax.with_sharding_constraint(params, self.replicated)

    def shard(self, params: Params) -> Any:
        return jax.lax.with_sharding_constraint(params, self.shardings(params))

    def shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), state)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        axes = [axis for axis, size in enumerate(shape) if size % self.mesh.size == 0]
        if not axes or np.prod(shape) < _LEAST_SHARDED:
            return PartitionSpec()
        largest = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[AXIS if axis == largest else None for axis in range(len(shape))])

    @property
    def _batches(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(None, AXIS))

    def compile(self, step: Step, state: Any) -> Step:
        inputs = (self.shardings(state), self.replicated, self._batches, self.replicated)
        return jax.jit(step, in_shardings=inputs, out_shardings=inputs[:2], donate_argnums=0)

    def place_batches(self, batches: Any) -> Any:
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(self._batches, array), batches)


def check_batch_size(batch_size: int, devices: int, grad_accum_steps: int) -> None:
    """Raise InputError unless the batch can be split evenly."""
    parts = devices * grad_accum_steps
    if batch_size < 1 or batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        by = f"{devices} devices" + (f" x {grad_accum_steps} microbatches" if grad_accum_steps > 1 else "")
        raise InputError(f"Batch size {batch_size} is not divisible by {by}; use {nearest}.")


def _global(tree: Any, shardings: Any) -> Any:
    """Place arrays, of which every process has the whole, on the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, where: NamedSharding) -> Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)
