"""Meshes of devices: DataMesh with a replicated state, and Sharded."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from cm_jax.parallelism.base import ImageFunction, ImageProgram, Parallelism, Step, Tree, grouped
from cm_jax.types import Params

AXIS, REPLICAS, SHARDS = "devices", "replicas", "shards"
_LEAST_SHARDED = 4096
"""Arrays with fewer elements are replicated."""


@dataclasses.dataclass(frozen=True)
class DataMesh(Parallelism):
    """jax.jit of jax.shard_map over a mesh: the state is replicated, and gradients are averaged once."""

    count: int | None = None
    """Number of devices; None: all."""
    local: bool = False
    """Devices of this process instead of all processes."""

    @property
    def devices(self) -> Sequence[Any]:
        """In the order of processes, as their shares of a batch: jax.make_mesh may reorder them by topology."""
        found = jax.local_devices() if self.local else jax.devices()
        return sorted(found, key=lambda device: (device.process_index, device.id))[: self.count]

    @property
    def within_process(self) -> Parallelism:
        return dataclasses.replace(self, local=True)

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def _batches(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(None, self.mesh.axis_names))

    def image_indices(self, count: int) -> Int[Array, " b"]:
        return jax.lax.axis_index(AXIS) * count + jnp.arange(count)

    def mean(self, tree: Any) -> Any:
        return jax.lax.pmean(tree, AXIS)

    def over_images(self, function: ImageFunction) -> ImageProgram:
        split = PartitionSpec(self.mesh.axis_names)

        def program(static: tuple[Any, ...], shared: Tree, rows: tuple[Tree, ...]) -> Tree:
            each = functools.partial(grouped(function), static)
            specs = {"in_specs": (PartitionSpec(), split), "out_specs": split}
            return jax.shard_map(each, mesh=self.mesh, **specs, check_vma=False)(shared, rows)

        compiled, rows_sharding = jax.jit(program, static_argnums=0), NamedSharding(self.mesh, split)
        return lambda static, shared, rows: compiled(static, shared, jax.device_put(rows, rows_sharding))

    def compile(self, step: Step, state: Any) -> Step:
        shardings = (self.replicated, self.replicated, self._batches, self.replicated)
        specs = tuple(sharding.spec for sharding in shardings)
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
        return jax.jit(mapped, in_shardings=shardings, out_shardings=shardings[:2], donate_argnums=0)

    def place_batches(self, batches: Any) -> Any:
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(self._batches, array), batches)


@dataclasses.dataclass(frozen=True)
class Sharded(DataMesh):
    """jax.jit over a mesh of replicas x shards. The batch is split over both axes, the state over shards: of each leaf
    the largest divisible axis.

    Parameters are gathered for the network; gradients are reduced into the shards, where the optimizer runs.
    """

    shards: int | None = None
    """Devices that share one copy of the state, neighbors in the order of processes; None: all."""

    @functools.cached_property
    def mesh(self) -> Mesh:
        devices = np.array(self.devices)
        return Mesh(devices.reshape(-1, self.shards or devices.size), (REPLICAS, SHARDS))

    @property
    def within_process(self) -> Parallelism:
        return DataMesh(local=True)

    def image_indices(self, count: int) -> Int[Array, " b"]:
        split = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return jax.lax.with_sharding_constraint(jnp.arange(count), split)

    def mean(self, tree: Any) -> Any:
        return tree

    def gather(self, params: Params | None) -> Any:
        return jax.lax.with_sharding_constraint(params, self.replicated)

    def shard(self, params: Params) -> Any:
        return jax.lax.with_sharding_constraint(params, self.shardings(params))

    def shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), state)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        axes = [axis for axis, size in enumerate(shape) if size % self.mesh.shape[SHARDS] == 0]
        if not axes or np.prod(shape) < _LEAST_SHARDED:
            return PartitionSpec()
        largest = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[SHARDS if axis == largest else None for axis in range(len(shape))])

    def compile(self, step: Step, state: Any) -> Step:
        inputs = (self.shardings(state), self.replicated, self._batches, self.replicated)
        return jax.jit(step, in_shardings=inputs, out_shardings=inputs[:2], donate_argnums=0)
