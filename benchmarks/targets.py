"""Compilation for devices that this machine does not have, by their own compilers.

NVIDIA's and Google's compilers run on the CPU: `pip install -e '.[aot]'`. Nothing is run.
"""

import contextlib
import dataclasses
import functools
import os
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.hlo import collectives
from benchmarks.program import Program, Traffic

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's text of an H100 SXM."""

_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""Environment in which libtpu does not ask Google Cloud which TPU this machine has, lets several processes compile at
the same time, and writes no log files."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device, their number, and the vendor's figures of one."""

    platform: str
    """cuda or tpu."""
    topology: str
    count: int
    peak: float
    """Dense bfloat16 operations per second."""
    peak_float32: float
    """Float32 operations per second at Precision.HIGHEST: without tensor cores; on a TPU six bfloat16 products each."""
    bandwidth: float
    """Bytes per second to and from memory."""
    memory: float
    """Bytes."""
    link: float
    """Bytes per second from a device to its neighbor in a ring."""

    @functools.cached_property
    def devices(self) -> Sequence[Any]:
        """Devices that programs can be compiled for. Raises Exception without the compiler."""
        from jax.experimental import topologies

        if self.platform == "cuda":
            options = {"target_config": _H100, "topology": self.topology}
            return topologies.get_topology_desc(platform="cuda", **options).devices[: self.count]
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(self.topology, platform="tpu").devices[: self.count]

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Traces as on these devices."""
        return tracing_for(self.platform, self.devices)


@contextlib.contextmanager
def tracing_for(platform: str, devices: Sequence[Any] = ()) -> Iterator[None]:
    """Traces as on `devices` of a platform: they are jax.devices(), and the library chooses its operations for them.

    Without devices, programs can be lowered but not compiled, by `traced.lower(lowering_platforms=(platform,))`, and
    placed on meshes of the devices of this machine.
    """
    name, attention = {"cuda": "gpu", "tpu": "tpu"}[platform], "jax._src.cudnn.fused_attention_stablehlo"
    replaced: dict[str, Callable[..., Any]] = {
        "jax.default_backend": lambda: name,
        f"{attention}.check_compute_capability": lambda capability: float(capability) <= 9.0,
        f"{attention}.is_cuda_compute_capability_equal": lambda capability: capability == "9.0",
        f"{attention}.check_cudnn_version": lambda: 91000,
        "cm_jax.networks.operations._cuda_capability": lambda: 9.0 if platform == "cuda" else 0.0,
        "jax._src.compilation_cache.is_cache_used": lambda _: False,  # programs cannot be read back without the device
    }
    if devices:
        replaced |= {f"jax.{each}": lambda: list(devices) for each in ("devices", "local_devices")}
    jax.clear_caches()  # of operations chosen for other devices
    with contextlib.ExitStack() as stack:
        for place, function in replaced.items():
            stack.enter_context(unittest.mock.patch(place, function))
        yield
    jax.clear_caches()


_H100_SXM = {"platform": "cuda", "peak": 989e12, "peak_float32": 67e12, "bandwidth": 3.352e12, "memory": 84.9e9}
_V5E = {"peak": 197e12, "peak_float32": 197e12 / 6, "bandwidth": 819e9, "memory": 17.1e9, "link": 50e9}
_V5P = {"peak": 459e12, "peak_float32": 459e12 / 6, "bandwidth": 2765e9, "memory": 102e9, "link": 100e9}

TARGETS = {
    "h100": Target(topology="1x1x1", count=1, link=450e9, **_H100_SXM),
    "8xh100": Target(topology="1x1x8", count=8, link=450e9, **_H100_SXM),
    "v5e": Target("tpu", "v5e:2x2", 1, **_V5E),
    "v5e:4x4": Target("tpu", "v5e:4x4", 16, **_V5E),
    "v5e:16x16": Target("tpu", "v5e:16x16", 256, **_V5E),
    "v5p": Target("tpu", "v5p:2x2x1", 1, **_V5P),
}


class Costs(NamedTuple):
    """Costs of a compiled program on each device."""

    arguments: int
    """Bytes of arguments."""
    results: int
    """Bytes of results that are not in the place of donated arguments."""
    temporaries: int
    """Bytes."""
    operations: float
    """Floating-point operations of products; with those by padding in cuDNN's convolutions."""
    traffic: list[Traffic]
    """Bytes to and from memory: operands and results of every kernel, each array once."""
    collectives: dict[str, tuple[int, int]]
    """(number, bytes of the results) by kind."""
    estimate: float | None
    """Seconds by the compiler's own estimate, if it has one."""

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.traffic)

    @property
    def kernels(self) -> int:
        return sum(row.number for row in self.traffic)

    @property
    def memory(self) -> int:
        """Bytes that the program needs."""
        return self.arguments + self.results + self.temporaries

    def roofline(self, target: Target, *, float32: bool = False) -> tuple[float, float]:
        """Seconds at the peak rate of operations, and of memory."""
        peak = target.peak_float32 if float32 else target.peak
        return self.operations / peak, self.bytes / target.bandwidth


def costs(compiled: jax.stages.Compiled) -> Costs:
    """Costs of a program that a target's compiler has compiled."""
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None
    estimate = analysis.get("optimal_seconds", 0.0)
    return costs_of_text(compiled.as_text() or "")._replace(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        estimate=estimate if estimate > 0 else None,  # negative for large programs
    )


def costs_of_text(text: str) -> Costs:
    """Costs by the text of an optimized and scheduled program. Temporaries include results and are a lower bound."""
    program, sent = Program(text), dict[str, tuple[int, int]]()
    for kind, size in collectives(text):
        number, total = sent.get(kind, (0, 0))
        sent[kind] = number + 1, total + size
    traffic = program.traffic()
    operations = sum(row.operations for row in traffic)
    return Costs(program.arguments(), 0, program.peak(), operations, traffic, sent, None)


def compile_for(target: Target, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compile a function of arrays, or a jitted one, for the first device of a target.

    arguments: arrays or their shapes, jax.ShapeDtypeStruct. The caller is inside `target.active()`.
    """
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*placed(arguments, jax.sharding.SingleDeviceSharding(target.devices[0]))).compile()


def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes of arrays, on devices."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding), tree)
