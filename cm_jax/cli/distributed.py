"""Options for the processes and devices of a command."""

import dataclasses
from typing import Literal

import jax
from jax.experimental import multihost_utils

from cm_jax.errors import InputError
from cm_jax.parallelism import ImageKind, Parallelism, choose_for_images
from cm_jax.progress import activity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed:
    distributed: Literal["off", "auto"] = "off"
    """auto: connect the processes that Slurm, Open MPI, Kubernetes or a TPU pod started, as its environment says."""
    coordinator: str = ""
    """HOST:PORT of process 0, to connect processes without `--distributed auto`. Default: a single process."""
    processes: int | None = None
    """Number of processes. Default: a single process."""
    process: int | None = None
    """Index of this process, from 0. Default: a single process."""

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.processes is not None, self.process is not None)
        if any(given) and self.distributed == "auto":
            raise InputError(
                "--distributed auto finds the other processes: omit --coordinator, --processes, --process."
            )
        if any(given) and not all(given):
            raise InputError("A run of several processes needs all of --coordinator, --processes and --process.")
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}.")
        if self.processes is not None and self.processes < 1:
            raise InputError(f"--processes must be at least 1, got {self.processes}.")
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise InputError(f"--process must lie in [0, {self.processes - 1}], got {self.process}.")

    def connect(self) -> None:
        """Connect this process to the others, if there are any, before JAX looks at its devices. Raises InputError."""
        if not self.coordinator and self.distributed == "off":
            return
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        try:
            with activity("Waiting for the other processes"):
                if self.coordinator:
                    jax.distributed.initialize(self.coordinator, self.processes, self.process)
                else:
                    jax.distributed.initialize()
                # Later, processes would wait for each other's devices and sockets for 30 s to 2 min.
                multihost_utils.sync_global_devices("connected")
        except ValueError as error:  # an incomplete description of the processes
            raise InputError(
                "--distributed auto found no launcher (Slurm, Open MPI up to version 4, Kubernetes, TPU pod): start "
                "the command with one, as in docs/scaling.md, or give --coordinator, --processes and --process."
            ) from error
        except RuntimeError as error:
            where = f"the coordinator at {self.coordinator}" if self.coordinator else "the other processes"
            raise InputError(f"Cannot connect to {where}: {error}.") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Distributed):
    """For commands whose images the processes share, and in each process its devices."""

    parallel: ImageKind = "auto"
    """How the devices of a process share images: one device, pmap, or mesh (jax.shard_map). auto: pmap if there are
    several devices."""

    @property
    def parallelism(self) -> Parallelism:
        return choose_for_images(self.parallel)
