"""Conversion between PyTorch checkpoints and ours in every direction, and from those of CIFAR-10, without loss."""

from cm_jax.conversion.destinations import Kind, write
from cm_jax.conversion.sources import Source, Untold, read

__all__ = ["Kind", "Source", "Untold", "read", "write"]
