"""The plan of a U-Net: its blocks in the order they are applied.

The Flax module, its parameter names and the converters are all derived from this one list.
"""

from typing import Literal, NamedTuple

from cm_jax.networks.layers import Resample


class Unit(NamedTuple):
    """One residual block, attention block or resampling convolution, or one level of the input pyramid."""

    kind: Literal["residual", "attention", "convolution", "pyramid"]
    name: str
    """Name within its block."""
    channels_in: int
    channels_out: int
    resample: Resample | None = None


class Block(NamedTuple):
    """Units applied in turn. An encoder block's output is kept as a skip; a decoder block concatenates one first."""

    name: str
    units: tuple[Unit, ...]


class UNetPlan(NamedTuple):
    """All blocks between the stem and the head."""

    encoder: tuple[Block, ...]
    middle: Block
    decoder: tuple[Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.encoder, self.middle, *self.decoder)
