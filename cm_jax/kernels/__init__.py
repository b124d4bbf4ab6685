"""Convolutions for CPUs in C++, compiled on this machine at first use: XLA's own are the slow part of a network there.

`convolve` is the 3x3 convolution in float32 as a JAX primitive: it differentiates in both modes to any order, and maps.
Where there is no C++ compiler, or the environment says CM_JAX_KERNELS=off, `available()` is False, and networks take
XLA's convolutions.
"""

from cm_jax.kernels.building import available, off, suits
from cm_jax.kernels.convolution import convolve
from cm_jax.kernels.memory import keep_memory
from cm_jax.kernels.primitives import differentiable
from cm_jax.kernels.product import multiply

__all__ = ["available", "convolve", "differentiable", "keep_memory", "multiply", "off", "suits"]
