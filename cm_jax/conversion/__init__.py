"""Conversion between PyTorch checkpoints and ours, in every direction, without loss; and from the CIFAR-10 original's."""

from cm_jax.conversion.destinations import Kind, write
from cm_jax.conversion.sources import Source, Untold, read

__all__ = ["Kind", "Source", "Untold", "read", "write"]
