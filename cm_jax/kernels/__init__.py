"""float32 CPU kernels in C++ as JAX primitives, compiled on first use with the machine's C++ compiler.

They differentiate in both modes to any order and support vmap. Without a compiler, or with CM_JAX_KERNELS=off in the
environment, `available()` is False and networks use XLA.
"""

from cm_jax.kernels.building import available, off, suits, switched_off
from cm_jax.kernels.memory import keep_memory
from cm_jax.kernels.primitives import convolve, differentiable, multiply
