"""Operation count of a CD run and its predicted duration on several machines: python -m benchmarks.operations

Operations are XLA's count of the lowered program before optimization; nothing is compiled or run. The predictions
assume a fraction of the peak throughput (--utilization) and a ring all-reduce of the gradient that does not overlap
with computation. Peaks and bandwidths are the vendors' figures.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.common import header, parser, row
from cm_jax import kernels
from cm_jax.networks import ADMUNet
from cm_jax.presets import PRESETS

STEPS, BATCH = 600_000, 2048
"""CD on ImageNet-64 (CM, appendix C)."""


class Machine(NamedTuple):
    name: str
    devices: int
    peak: float
    """Dense bfloat16 operations per second and device."""
    link: float
    """Bytes per second from a device to its neighbor in a ring."""


MACHINES = (
    Machine("8 x H100 SXM, NVLink", 8, 989e12, 450e9),
    Machine("64 x TPU v5e", 64, 197e12, 50e9),
    Machine("256 x TPU v5e", 256, 197e12, 50e9),
    Machine("64 x TPU v5p", 64, 459e12, 100e9),
    Machine("256 x TPU v5p", 256, 459e12, 100e9),
)


class Counts(NamedTuple):
    """Operations per image, and the number of parameters."""

    forward: float
    gradient: float
    """Forward and backward pass of the student."""
    parameters: int

    @property
    def step(self) -> float:
        """A CD step: gradient of the student, one target pass, two teacher passes (Heun)."""
        return self.gradient + 3 * self.forward


def count(network: ADMUNet) -> Counts:
    """Operations of the lowered programs at batch size 1."""
    network = dataclasses.replace(network, precision="float32", rematerialize=False, dropout=0.0, attention="plain")
    params = network.shapes()
    x = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    time, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    labels = labels if network.classes else None

    def loss(*arguments: object) -> jax.Array:
        return jnp.mean(network.predict(*arguments) ** 2)  # type: ignore[arg-type]

    def operations(function: object) -> float:
        return jax.jit(function).lower(params, x, time, labels).cost_analysis()["flops"]  # type: ignore[arg-type]

    with kernels.off():  # XLA does not count operations of custom kernels
        return Counts(operations(network.predict), operations(jax.grad(loss)), network.parameter_count())


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--preset", default="imagenet64-cd", choices=sorted(PRESETS), help="Preset that defines the network."
    )
    options.add_argument("--utilization", type=float, default=0.4, help="Fraction of the peak throughput.")
    options.add_argument("--batch", type=int, default=BATCH, help="Global batch size.")
    options.add_argument("--steps", type=int, default=STEPS, help="Number of training steps.")
    args = options.parse_args()
    jax.config.update("jax_platforms", "cpu")  # XLA does not count operations on GPU
    counts = count(PRESETS[args.preset]().network)  # type: ignore[arg-type]
    forward, gradient, step = (operations / 1e9 for operations in (counts.forward, counts.gradient, counts.step))
    print(f"Forward {forward:.1f}, gradient {gradient:.1f}, step {step:.1f} GFLOP per image.")
    print(f"{counts.parameters:,} parameters; gradient {4 * counts.parameters / 1e9:.2f} GB in float32.")
    print(f"Assumed: {args.utilization:.0%} of the peak, batch {args.batch}, {args.steps:,} steps.\n")
    columns = ("Images per device", "Compute (ms)", "All-reduce (ms)", "Efficiency", "Images/s", "Days")
    print(header("Machine", *columns))
    for machine in MACHINES:
        compute = args.batch * counts.step / (machine.devices * machine.peak * args.utilization)
        all_reduce = 2 * (machine.devices - 1) / machine.devices * 4 * counts.parameters / machine.link
        seconds = compute + all_reduce
        print(
            row(
                machine.name,
                f"{args.batch / machine.devices:.0f}",
                f"{1000 * compute:.0f}",
                f"{1000 * all_reduce:.0f}",
                f"{compute / seconds:.2f}",
                f"{args.batch / seconds:.0f}",
                f"{args.steps * seconds / 86400:.1f}",
            )
        )


if __name__ == "__main__":
    main()
