"""Programs on one or many devices, with equal results up to rounding: OneDevice, Pmap, DataMesh or Sharded.

Training steps run on the devices of all processes, functions of images (sampling, features) on those of one process.
The random numbers of an image depend on its index in the global batch, not on its device.
"""

import functools
from typing import Literal

import jax

from cm_jax.errors import InputError
from cm_jax.parallelism.base import ImageFunction, ImageProgram, OneDevice, Parallelism, Tree
from cm_jax.parallelism.meshes import DataMesh, Sharded
from cm_jax.parallelism.pmap import Pmap

__all__ = [
    "DataMesh",
    "ImageFunction",
    "ImageKind",
    "Kind",
    "OneDevice",
    "Parallelism",
    "Pmap",
    "Sharded",
    "Tree",
    "check_batch_size",
    "choose",
    "choose_for_images",
    "compiled_over_images",
]

ImageKind = Literal["auto", "one", "pmap", "mesh"]
Kind = Literal["auto", "one", "pmap", "mesh", "sharded"]


def choose(kind: Kind = "auto", *, shards: int | None = None) -> Parallelism:
    """The parallelism of a name, over all processes. auto: one device, pmap on one host, or a mesh across hosts.

    shards: for "sharded". Raises InputError if the devices cannot be grouped so.
    """
    processes, devices = jax.process_count(), len(jax.devices())
    if kind == "one" and processes > 1:
        raise InputError("--parallel one supports one process only: remove it.")
    if shards is not None and (kind != "sharded" or devices % shards):
        problem = f"{devices} devices cannot be grouped by {shards}" if kind == "sharded" else f"--parallel is {kind}"
        raise InputError(f"{problem}: --shards needs --parallel sharded and a divisor of the number of devices.")
    if kind == "auto":
        kind = "mesh" if processes > 1 else "pmap" if devices > 1 else "one"
    return {"one": OneDevice(), "pmap": Pmap(), "mesh": DataMesh(), "sharded": Sharded(shards=shards)}[kind]


def choose_for_images(kind: ImageKind = "auto") -> Parallelism:
    """The parallelism of a name, over the devices of this process. auto: one device, or pmap."""
    if kind == "auto":
        kind = "pmap" if jax.local_device_count() > 1 else "one"
    return {"one": OneDevice(), "pmap": Pmap(local=True), "mesh": DataMesh(local=True)}[kind]


@functools.cache
def compiled_over_images(function: ImageFunction, parallelism: Parallelism) -> ImageProgram:
    """`parallelism.over_images(function)`, compiled once."""
    return parallelism.over_images(function)


def check_batch_size(batch_size: int, devices: int, grad_accum_steps: int) -> None:
    """Raise InputError unless the batch can be split evenly."""
    parts = devices * grad_accum_steps
    if batch_size < 1 or batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        by = f"{devices} devices" + (f" x {grad_accum_steps} microbatches" if grad_accum_steps > 1 else "")
        raise InputError(f"Batch size {batch_size} is not divisible by {by}; use {nearest}.")
