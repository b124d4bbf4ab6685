"""Settings that all U-Nets share, and the plan of their blocks."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import flax.linen as nn

from cm_jax.errors import InputError
from cm_jax.networks.layers import Modulation, Resample, Style
from cm_jax.networks.operations import Implementation
from cm_jax.types import ImageSize, Precision, height_width


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
    """All blocks between the stem and the head. The parameter names and the converters are derived from this list."""

    encoder: tuple[Block, ...]
    middle: Block
    decoder: tuple[Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.encoder, self.middle, *self.decoder)


@dataclasses.dataclass(frozen=True)
class UNetConfig(abc.ABC):
    """Settings of a U-Net, and the plan of its blocks. Raises InputError for settings that cannot be built."""

    image_size: ImageSize
    """Height and width of the training images, or one number for square images. The network accepts any multiples of
    2^(levels - 1)."""
    image_channels: int
    """Channels of the images."""
    base_channels: int
    """Channels at multiplier 1. The time embedding has four times as many."""
    channel_mult: tuple[float, ...]
    """Channels of each level divided by base_channels. Each level downsamples the one before by 2."""
    blocks_per_level: int
    """Residual blocks per level."""
    attention_factors: tuple[int, ...]
    """Downsampling factors of the levels with attention: at 64 pixels, 2 means attention at resolution 32."""
    classes: int | None = dataclasses.field(default=None, kw_only=True)
    """Number of classes; None for an unconditional network."""
    interval_embedding: bool = dataclasses.field(default=False, kw_only=True)
    """Embed the length of a time interval as well, and add it to the time embedding (MeanFlow)."""
    guidance_embedding: bool = dataclasses.field(default=False, kw_only=True)
    """Embed the guidance strength of the teacher as well (distillation with a range of strengths)."""
    augment_dim: int = dataclasses.field(default=0, kw_only=True)
    """Number of augmentation parameters that the network takes as input (EDM: 9). They are zero at sampling."""
    output_channels: int | None = dataclasses.field(default=None, kw_only=True)
    """Channels of the last convolution. Those beyond image_channels, learned variances, are not used. Default:
    image_channels."""
    uncertainty: bool = dataclasses.field(default=False, kw_only=True)
    """Whether the network has a head for the uncertainty u(sigma), which only its training uses (EDM2, sCM)."""
    modulation: Modulation = dataclasses.field(default="scale_shift", kw_only=True)
    """How the embedding enters a residual block: scale_shift, additive, or normalized (sCM)."""
    dropout: float = dataclasses.field(default=0.0, kw_only=True)
    """Dropout rate in residual blocks."""
    dropout_size: int | None = dataclasses.field(default=None, kw_only=True)
    """Largest feature-map size with dropout, in pixels (iCT and ECT on ImageNet-64: 16). None: no limit."""
    precision: Precision = dataclasses.field(default="float32", kw_only=True)
    """Precision of matrix products and convolutions. Norms, softmax, embeddings and the head stay in float32."""
    attention: Implementation = dataclasses.field(default="auto", kw_only=True)
    """Attention implementation: plain (supports forward-mode derivatives), cudnn, or auto."""
    rematerialize: bool = dataclasses.field(default=False, kw_only=True)
    """Recompute activations in the backward pass instead of storing them."""

    def __post_init__(self) -> None:
        if isinstance(self.image_size, tuple | list):
            sides = tuple(self.image_size)
            object.__setattr__(self, "image_size", sides[0] if sides in [sides[:1] * 2] else sides)
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_factors", tuple(self.attention_factors))
        problems = list(self._size_problems()) or [*self._problems(), *self._shared_problems()]
        if problems:
            raise InputError("This network cannot be built: " + "; ".join(problems) + ".")

    def _size_problems(self) -> Iterator[str]:
        """Sizes outside the allowed range, without which nothing else can be checked."""
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        if len(sides) != 2:
            yield f"image_size must be one number, or height and width (got {self.image_size})"
        sizes = [
            *(("image_size", side, 2**13) for side in dict.fromkeys(sides)),
            ("image_channels", self.image_channels, 2**20),
            ("base_channels", self.base_channels, 2**20),
            ("blocks_per_level", self.blocks_per_level, 64),
            ("the number of levels", len(self.channel_mult), 12),
        ]
        for name, size, most in sizes:
            if not 1 <= size <= most:
                yield f"{name} must lie in [1, {most}] (got {size})"
        if self.classes is not None and not 1 <= self.classes <= 2**20:
            yield f"classes must lie in [1, {2**20}], or be None for an unconditional network (got {self.classes})"
        if not all(0.5 < multiplier * self.base_channels <= 2**20 for multiplier in self.channel_mult):
            yield f"channel_mult must give every level 1 to {2**20} channels (got {self.channel_mult})"

    @abc.abstractmethod
    def _problems(self) -> Iterator[str]:
        """Every way in which the fields of the network's own family contradict each other."""

    def _norm_problems(self) -> Iterator[str]:
        """Blocks whose channels do not split into norm groups."""
        units = [unit for block in self.plan().blocks for unit in block.units if unit.kind != "pyramid"]
        for channels in sorted({side for unit in units for side in (unit.channels_in, unit.channels_out)}):
            groups, least = max(1, self.style.groups(channels)), self.style.min_group_size
            if channels % groups or channels < least:
                split = f"{groups} norm groups of at least {least} channels"
                yield f"a block has {channels} channels, which do not split into {split}"

    def _head_problems(self) -> Iterator[str]:
        """Blocks whose channels do not split into attention heads."""
        units = [unit for block in self.plan().blocks for unit in block.units if unit.kind == "attention"]
        for channels in sorted({unit.channels_out for unit in units}):
            if channels % self.heads_for(channels):
                heads = f"{self.heads_for(channels)} attention heads"
                yield f"a block has {channels} channels, which do not split into {heads}"

    def _shared_problems(self) -> Iterator[str]:
        if not 0 <= self.dropout < 1:
            yield f"dropout must lie in [0, 1) (got {self.dropout})"
        if not 0 <= self.augment_dim <= 64:
            yield f"augment_dim must lie in [0, 64] (got {self.augment_dim})"
        if not self.image_channels <= self.head_channels <= 2 * self.image_channels:
            yield f"output_channels must lie in [image_channels, 2 image_channels] (got {self.output_channels})"
        if self.dropout_size is not None and self.dropout_size < 1:
            yield f"dropout_size must be positive, or None for every feature map (got {self.dropout_size})"
        if any(side % self.reduction for side in self.image_shape[:2]):
            yield (
                f"{len(self.channel_mult)} levels downsample {len(self.channel_mult) - 1} times by 2, so image_size "
                f"must be a multiple of {self.reduction} (got {self.image_size})"
            )

    @property
    @abc.abstractmethod
    def style(self) -> Style:
        """Settings of the blocks that differ between families of U-Nets."""

    @property
    @abc.abstractmethod
    def stem_channels(self) -> int:
        """Channels of the first convolution."""

    @abc.abstractmethod
    def heads_for(self, channels: int) -> int:
        """Number of attention heads in a block with this many channels."""

    @abc.abstractmethod
    def embedder(self, name: str = "embedding") -> nn.Module:
        """The module that embeds c_noise and labels."""

    def plan(self) -> UNetPlan:
        """The blocks in the order they are applied, after the stem and before the head."""
        style, widths, last = self.style, self.level_channels, self.blocks_per_level

        def units(level: int, channels: int, attends: bool = True) -> tuple[Unit, ...]:
            residual = Unit("residual", "residual", channels, widths[level])
            attention = Unit("attention", "attention", widths[level], widths[level])
            attends = attends and 2**level in self.attention_factors and self.heads_for(widths[level]) > 0
            return (residual, attention) if attends else (residual,)

        channels, encoder, decoder = self.stem_channels, [], []
        for level, width in enumerate(widths):
            for index in range(last):
                encoder.append(Block(f"down_{level}_{index}", units(level, channels)))
                channels = width
            if level < len(widths) - 1:
                down = [Unit(style.resampling_unit, "downsample", width, width, "down")]
                if style.pyramid:
                    down.append(Unit("pyramid", "pyramid", (self.image_channels, *widths)[level], width, "down"))
                encoder.append(Block(f"down_{level}_{last}", tuple(down)))

        middle = [Unit("residual", f"residual_{number}", channels, channels) for number in (1, 2)]
        if self.heads_for(channels) > 0:
            middle.insert(1, Unit("attention", "attention", channels, channels))

        skips = [self.stem_channels, *(block.units[-1].channels_out for block in encoder)]
        for level, width in reversed(list(enumerate(widths))):
            for index in range(last + 1):
                up = units(level, channels + skips.pop(), style.decoder_attention == "every" or index == last)
                if level > 0 and index == last:
                    up = (*up, Unit(style.resampling_unit, "upsample", width, width, "up"))
                decoder.append(Block(f"up_{level}_{index}", up))
                channels = width

        return UNetPlan(tuple(encoder), Block("middle", tuple(middle)), tuple(decoder))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(multiplier * self.base_channels) for multiplier in self.channel_mult)

    @property
    def head_channels(self) -> int:
        """Channels of the last convolution."""
        return self.output_channels or self.image_channels

    @property
    def reduction(self) -> int:
        """Image size divided by the size of the deepest feature map."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the training images."""
        return (*height_width(self.image_size), self.image_channels)
