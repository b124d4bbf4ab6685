"""Time of convolution gradients inside and outside `lax.scan`: python -m benchmarks.loop_gradients

XLA on CPU is far slower inside a loop, so `Parallelism.scan` unrolls loops on CPU.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import header, parser, row

REPEATS = 7


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution, NHWC."""
    layout = ("NHWC", "HWIO", "NHWC")
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, precision=highest)


def forward(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return kernel + 1e-9 * convolution(jax.nn.silu(convolution(x, kernel)), kernel).mean()


def step(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return kernel - jax.grad(lambda k: jnp.square(convolution(jax.nn.silu(convolution(x, k)), k)).mean())(kernel)


def looped(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda kernel, x: jax.lax.scan(lambda k, _: (function(k, x), None), kernel, None, length=1)[0]


def milliseconds(function: Callable[..., Any], *inputs: jax.Array) -> float:
    """Median duration of `REPEATS` calls after the first."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*inputs))
    spent = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)


def main() -> None:
    parser(__doc__).parse_args()
    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 32))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 32, 32))
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}; two 3x3 convolutions, 16 images of 32x32x32, float32\n")
    print(header("Function", "Outside a loop, ms", "Inside, ms", "Ratio"))
    for name, function in (("forward", forward), ("gradient step", step)):
        outside, inside = milliseconds(function, kernel, x), milliseconds(looped(function), kernel, x)
        print(row(name, f"{outside:.1f}", f"{inside:.1f}", f"{inside / outside:.1f}"))


if __name__ == "__main__":
    main()
