"""jax.pmap."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cm_jax.parallelism.base import ImageFunction, ImageProgram, Step, Tree, grouped
from cm_jax.parallelism.meshes import AXIS, DataMesh


@dataclasses.dataclass(frozen=True)
class Pmap(DataMesh):
    """jax.pmap, which JAX keeps in maintenance mode, in place of DataMesh's jax.shard_map."""

    @property
    def _devices(self) -> Sequence[Any] | None:
        return None if self.count is None and not self.local else self.devices

    def over_images(self, function: ImageFunction) -> ImageProgram:
        axes: Any = (None, None, 0)
        options: Any = {"static_broadcasted_argnums": 0, "devices": self._devices}
        compiled, here = jax.pmap(grouped(function), AXIS, in_axes=axes, **options), len(self.devices)

        def program(static: tuple[Any, ...], shared: Tree, rows: tuple[Tree, ...]) -> Tree:
            return compiled(static, shared, jax.tree.map(lambda a: a.reshape(here, -1, *a.shape[1:]), rows))

        return program

    def fetch(self, result: Tree) -> Tree:
        return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), result)

    def compile(self, step: Step, state: Any) -> Step:
        axes: Any = (None, None, 0, None)
        return jax.pmap(step, AXIS, in_axes=axes, out_axes=axes[:2], donate_argnums=0, devices=self._devices)

    def place_batches(self, batches: Any) -> Any:
        here = sum(device.process_index == jax.process_index() for device in self.devices)

        def split(array: np.ndarray) -> np.ndarray:
            steps, images, *rest = array.shape
            return np.moveaxis(array.reshape(steps, here, images // here, *rest), 1, 0)

        return jax.tree.map(split, batches)
