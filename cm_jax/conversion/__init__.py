"""Conversion between PyTorch checkpoints and ours in every direction, and from those of CIFAR-10, without loss."""

from cm_jax.conversion.read import CheckpointHints, Source, read
from cm_jax.conversion.write import Kind, write

__all__ = ["CheckpointHints", "Kind", "Source", "read", "write"]
