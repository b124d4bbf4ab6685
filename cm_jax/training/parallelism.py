"""One step on many devices, in three ways with one result.

`OneDevice` is jax.jit. `Pmap` is jax.pmap over the local devices of every process, each with a copy of everything.
`Sharded` is jax.jit over a mesh, where parameters, optimizer state and averages are split among the devices and put
together for the products, so that a network fits whose state would not.

Image i of a batch draws from its own key whichever device it is on; so the three agree to rounding.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from cm_jax.errors import InputError
from cm_jax.types import Params

AXIS = "devices"
_LEAST_SHARDED = 4096
"""Leaves with fewer numbers are not worth splitting."""

Step = Callable[..., tuple[Any, dict[str, Array]]]
"""(state, constants, batches, key) -> (state, metrics); batches [steps, b, ...]."""


class Parallelism(abc.ABC):
    """What a step asks of the devices, how arrays are put there, and how the step is compiled."""

    @property
    @abc.abstractmethod
    def devices(self) -> Sequence[Any]: ...

    # Inside the compiled step
    def scan(self, function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, items: Any) -> tuple[Any, Any]:
        """jax.lax.scan; on CPUs written out, because XLA's loops have slow gradients of convolutions there.

        (Those in a loop are not brought to the form that the fast library takes: a step took twenty times as long.)
        """
        if self.devices[0].platform != "cpu":
            return jax.lax.scan(function, carry, items)
        results = []
        for index in range(jax.tree.leaves(items)[0].shape[0]):
            carry, result = function(carry, jax.tree.map(lambda item, index=index: item[index], items))
            results.append(result)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    def image_numbers(self, count: int) -> Int[Array, " b"]:
        """Places in the global batch of the `count` images at hand."""
        return jnp.arange(count)

    def mean(self, tree: Any) -> Any:
        """The mean over devices of means over the images at hand."""
        return tree

    def whole(self, params: Params | None) -> Any:
        """Parameters as the network reads them."""
        return params

    def split(self, params: Params) -> Any:
        """Parameters, or gradients, as the optimizer keeps them."""
        return params

    # Outside
    @abc.abstractmethod
    def compile(self, step: Step, state: Any, constants: Any) -> Step:
        """The step, compiled at its first call; its state argument is used up."""

    @abc.abstractmethod
    def shardings(self, state: Any) -> Any:
        """Where each leaf of a state, or of its shapes, lies."""

    def place_state(self, state: Any) -> Any:
        """Copies on the devices that belong to nobody else, because the step uses them up."""
        return jax.tree.map(jnp.copy, _global(state, self.shardings(state)))

    @abc.abstractmethod
    def place_constants(self, constants: Any) -> Any: ...

    @abc.abstractmethod
    def place_batches(self, batches: Any) -> Any:
        """NumPy arrays [steps, b, ...] with this process's share of each batch, on the devices."""


@dataclasses.dataclass(frozen=True)
class OneDevice(Parallelism):
    """jax.jit on the first local device."""

    @property
    def devices(self) -> Sequence[Any]:
        return jax.local_devices()[:1]

    def compile(self, step: Step, state: Any, constants: Any) -> Step:
        del state, constants
        return jax.jit(step, donate_argnums=0)

    def shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda _: SingleDeviceSharding(self.devices[0]), state)

    def place_constants(self, constants: Any) -> Any:
        return jax.device_put(constants, self.devices[0])

    def place_batches(self, batches: Any) -> Any:
        return jax.device_put(batches, self.devices[0])


@dataclasses.dataclass(frozen=True)
class _Many(Parallelism):
    """What both ways over all devices share."""

    count: int | None = None
    """Number of devices; None takes all, of all processes."""

    @property
    def devices(self) -> Sequence[Any]:
        return jax.devices()[: self.count]

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def place_constants(self, constants: Any) -> Any:
        return _global(constants, jax.tree.map(lambda _: self.replicated, constants))


@dataclasses.dataclass(frozen=True)
class Pmap(_Many):
    """jax.pmap: every device has a copy of the state and a share of the batch, and gradients are averaged once."""

    def image_numbers(self, count: int) -> Int[Array, " b"]:
        return jax.lax.axis_index(AXIS) * count + jnp.arange(count)

    def mean(self, tree: Any) -> Any:
        return jax.lax.pmean(tree, AXIS)

    def compile(self, step: Step, state: Any, constants: Any) -> Step:
        del state, constants
        devices = None if self.count is None else self.devices
        return jax.pmap(
            step,
            AXIS,
            in_axes=(None, None, 0, None),
            out_axes=(None, None),  # type: ignore[arg-type]  # None is as good here as in in_axes
            donate_argnums=0,
            devices=devices,
        )

    def shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda _: self.replicated, state)

    def place_batches(self, batches: Any) -> Any:
        here = sum(device.process_index == jax.process_index() for device in self.devices)

        def apart(array: np.ndarray) -> np.ndarray:
            steps, images, *rest = array.shape
            return np.moveaxis(array.reshape(steps, here, images // here, *rest), 1, 0)

        return jax.tree.map(apart, batches)


@dataclasses.dataclass(frozen=True)
class Sharded(_Many):
    """jax.jit over a mesh of one axis, over which the batch is split and, leaf by leaf, the largest axis that divides.

    Parameters are gathered for the network, and gradients are averaged into the shards; so is what is done with them.
    """

    def image_numbers(self, count: int) -> Int[Array, " b"]:
        return jax.lax.with_sharding_constraint(jnp.arange(count), NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def whole(self, params: Params | None) -> Any:
        return jax.lax.with_sharding_constraint(params, jax.tree.map(lambda _: self.replicated, params))

    def split(self, params: Params) -> Any:
        return jax.lax.with_sharding_constraint(params, self.shardings(params))

    def shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), state)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        devices = self.mesh.size
        axes = [axis for axis, size in enumerate(shape) if size % devices == 0]
        if not axes or np.prod(shape) < _LEAST_SHARDED:
            return PartitionSpec()
        largest = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[AXIS if axis == largest else None for axis in range(len(shape))])

    def compile(self, step: Step, state: Any, constants: Any) -> Step:
        fixed = jax.tree.map(lambda _: self.replicated, constants)
        batches = NamedSharding(self.mesh, PartitionSpec(None, AXIS))
        shardings = self.shardings(state)
        return jax.jit(
            step,
            in_shardings=(shardings, fixed, batches, self.replicated),
            out_shardings=(shardings, self.replicated),
            donate_argnums=0,
        )

    def place_batches(self, batches: Any) -> Any:
        sharding = NamedSharding(self.mesh, PartitionSpec(None, AXIS))
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batches)


def check_batch_size(batch_size: int, devices: int, accumulate: int) -> None:
    """Raise InputError unless a batch can be shared out evenly."""
    parts = devices * accumulate
    if batch_size < 1 or batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        over = f"{devices} devices" if accumulate == 1 else f"{devices} devices in {accumulate} parts each"
        raise InputError(f"A batch of {batch_size} images cannot be shared out over {over}: the nearest is {nearest}.")


def _global(tree: Any, shardings: Any) -> Any:
    """On the devices of all processes; every process has the whole arrays."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, where: NamedSharding) -> Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)
