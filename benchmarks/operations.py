"""What a CD run must compute and move, and what that means for machines: python -m benchmarks.operations

Operations are XLA's count of the lowered program, before any optimisation; nothing is run and no memory is taken. The
predictions assume that matrix units reach a share of their peak and that the gradient is reduced around a ring while
nothing else is done: both are assumptions, printed with the table. Peaks and bandwidths are the makers' figures.
"""

import argparse
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cm_jax import kernels
from cm_jax.networks import ADMUNet
from cm_jax.presets import PRESETS

STEPS, BATCH = 600_000, 2048
"""Of the paper's CD run on ImageNet-64 (CM, appendix C)."""


class Machine(NamedTuple):
    name: str
    devices: int
    peak: float
    """Dense bfloat16 operations a second, a device."""
    link: float
    """Bytes a second that a device sends to its neighbour in a ring."""


MACHINES = (
    Machine("8 x H100 SXM, NVLink", 8, 989e12, 450e9),
    Machine("64 x TPU v5e", 64, 197e12, 50e9),
    Machine("256 x TPU v5e", 256, 197e12, 50e9),
    Machine("64 x TPU v5p", 64, 459e12, 100e9),
    Machine("256 x TPU v5p", 256, 459e12, 100e9),
)


class Counted(NamedTuple):
    """Of one image, and of the parameters."""

    forward: float
    gradient: float
    """Operations of the student's forward and backward pass."""
    parameters: int

    @property
    def step(self) -> float:
        """CD: the student's gradient, the target, and the teacher twice (Heun)."""
        return self.gradient + 3 * self.forward


def count(network: ADMUNet) -> Counted:
    """Operations of the lowered programs for a batch of one."""
    network = dataclasses.replace(network, precision="float32", rematerialize=False, dropout=0.0, attention="plain")
    params = network.shapes()
    x = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    time, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    labels = labels if network.classes else None

    def loss(*arguments: object) -> jax.Array:
        return jnp.mean(network.predict(*arguments) ** 2)  # type: ignore[arg-type]

    def operations(function: object) -> float:
        return jax.jit(function).lower(params, x, time, labels).cost_analysis()["flops"]  # type: ignore[arg-type]

    with kernels.off():  # XLA does not count what is done outside of it
        return Counted(operations(network.predict), operations(jax.grad(loss)), network.parameter_count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="imagenet64-cd", choices=sorted(PRESETS), help="whose network is counted")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that the step's products reach")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # on GPUs XLA does not count
    found = count(PRESETS[arguments.preset]().network)  # type: ignore[arg-type]
    one, gradient, step = (operations / 1e9 for operations in (found.forward, found.gradient, found.step))
    print(f"Forward {one:.1f}, gradient {gradient:.1f}, step {step:.1f} GFLOP an image.")
    print(f"{found.parameters:,} parameters; gradient {4 * found.parameters / 1e9:.2f} GB in float32.")
    print(f"Assumed: {arguments.share:.0%} of the peak, batch {arguments.batch}, {arguments.steps:,} steps.\n")
    print("| machine | images a device | compute ms | reduction ms | efficiency | images/s | days |")
    print("|---|---|---|---|---|---|---|")
    for machine in MACHINES:
        compute = arguments.batch * found.step / (machine.devices * machine.peak * arguments.share)
        reduction = 2 * (machine.devices - 1) / machine.devices * 4 * found.parameters / machine.link
        seconds = compute + reduction
        parts = [
            machine.name,
            f"{arguments.batch / machine.devices:.0f}",
            f"{1000 * compute:.0f}",
            f"{1000 * reduction:.0f}",
        ]
        parts += [
            f"{compute / seconds:.2f}",
            f"{arguments.batch / seconds:.0f}",
            f"{arguments.steps * seconds / 86400:.1f}",
        ]
        print(f"| {' | '.join(parts)} |")


if __name__ == "__main__":
    main()
