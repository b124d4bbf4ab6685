"""The ADM U-Net of the published consistency models (Dhariwal and Nichol 2021; Song et al. 2023, appendix C).

`ADMUNet` is at once the description of a network and the network: a frozen, hashable dataclass whose `predict` is a
pure function of parameters and input. `plan()` lists its parts in order; the network, its parameter names and the
converters are all read off that one list.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.errors import InputError
from cm_jax.networks.attention import Implementation
from cm_jax.networks.blocks import NORM_GROUPS, Dense, Embedding, Modulation, Resample, Style, parameter, sinusoid
from cm_jax.networks.unet import Block, Plan, UNet, Unit
from cm_jax.types import Labels, Precision


@dataclasses.dataclass(frozen=True)
class ADMUNet(UNet):
    """F(params, c_in x, c_noise, labels): the ADM U-Net with the options that the original has.

    The defaults are the published ImageNet-64 network. Raises InputError for a shape that cannot be built.
    """

    image_size: int = 64
    """Height and width that it was trained on; the network itself takes any size that halves often enough."""
    image_channels: int = 3
    width: int = 192
    """Channels at multiplier 1; the embedding is four times as wide."""
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    """Channels of every level over `width`; the image is halved from each level to the next."""
    blocks_per_level: int = 3
    attention_factors: tuple[int, ...] = (2, 4, 8)
    """Where attention stands, as factors of down-sampling: at 64 pixels, 2 is attention at resolution 32."""
    head_dim: int | None = 64
    """Channels of an attention head; None where `heads` fixes their number instead."""
    heads: int | None = None
    classes: int | None = 1000
    """Number of classes, or None for an unconditional network."""
    interval_embedding: bool = False
    """Whether it is also told the length of an interval, embedded like c_noise and added (MeanFlow)."""
    modulation: Modulation = "scale_shift"
    """How the embedding enters a block; the originals know scale_shift and additive only."""
    resampling: Literal["residual", "convolution"] = "residual"
    """Resample inside a residual block, or by a 3x3 convolution of its own."""
    dropout: float = 0.0
    dropout_size: int | None = None
    """Pixels across the largest feature maps that have dropout, 16 for ImageNet-64 in iCT and ECT; None: all have."""
    precision: Precision = "float32"
    """Of the products inside the blocks; norms, softmax, embeddings and the output head are float32 always."""
    attention: Implementation = "auto"
    rematerialize: bool = False
    """Recompute every block in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_factors", tuple(self.attention_factors))
        problems = list(self._problems())
        if problems:
            raise InputError("This network cannot be built: " + "; ".join(problems) + ".")

    def _problems(self) -> Any:
        """Every way in which the fields contradict each other."""
        if (
            min(self.width, self.blocks_per_level, self.image_size, self.image_channels) < 1
            or not self.channel_mult
            or min(self.channel_mult) <= 0
        ):
            yield "width, channel_mult, blocks_per_level, image_size and image_channels must all be positive"
            return
        if self.image_size > 2**13 or self.blocks_per_level > 64 or len(self.channel_mult) > 12:
            yield "image_size may be 8192 at most, blocks_per_level 64, and the levels 12"
            return
        if max(self.width * max(self.channel_mult), self.image_channels, self.classes or 0) > 2**20:
            yield "channels and classes may be a million at most"
            return
        if (self.head_dim is None) == (self.heads is None):
            yield f"give head_dim or heads, not both or neither (got {self.head_dim} and {self.heads})"
        elif (self.head_dim if self.head_dim is not None else self.heads or 0) < 1:
            yield f"head_dim and heads must be positive (got {self.head_dim} and {self.heads})"
        else:
            for level, channels in enumerate(self.level_channels):
                if channels % NORM_GROUPS:
                    yield f"level {level} has {channels} channels, not a multiple of the {NORM_GROUPS} norm groups"
                attends = 2**level in self.attention_factors or level == len(self.channel_mult) - 1
                if attends and channels % (self.head_dim or self.heads or 1):
                    heads = f"heads of width {self.head_dim}" if self.head_dim else f"{self.heads} heads"
                    yield f"level {level} has {channels} channels, which do not split into {heads}"
        if self.classes is not None and self.classes < 1:
            yield f"classes must be positive, or None for an unconditional network (got {self.classes})"
        if not 0 <= self.dropout < 1:
            yield f"dropout must lie in [0, 1) (got {self.dropout})"
        if self.dropout_size is not None and self.dropout_size < 1:
            yield f"dropout_size must be positive, or None for every feature map (got {self.dropout_size})"
        if self.image_size % self.reduction:
            yield (
                f"{len(self.channel_mult)} levels halve the image {len(self.channel_mult) - 1} times, so its size must "
                f"be a multiple of {self.reduction} (got {self.image_size})"
            )

    @property
    def style(self) -> Style:
        return Style()

    @property
    def stem_channels(self) -> int:
        return self.level_channels[0]

    def heads_for(self, channels: int) -> int:
        """Number of attention heads in a block of so many channels."""
        return self.heads or channels // (self.head_dim or channels)

    def plan(self) -> Plan:
        """The blocks in the order they are applied, after the stem and before the head."""
        deepest = len(self.channel_mult) - 1
        channels = self.level_channels[0]
        skips = [channels]
        encoder, decoder = [], []

        def attention(level: int, width: int) -> tuple[Unit, ...]:
            attends = 2**level in self.attention_factors
            return (Unit("attention", "attention", width, width),) if attends else ()

        def resample(direction: Resample, width: int) -> Unit:
            kind = "residual" if self.resampling == "residual" else "convolution"
            return Unit(kind, f"{direction}sample", width, width, direction)

        for level, width in enumerate(self.level_channels):
            for index in range(self.blocks_per_level):
                units = (Unit("residual", "residual", channels, width), *attention(level, width))
                encoder.append(Block(f"down_{level}_{index}", units))
                channels = width
                skips.append(channels)
            if level < deepest:
                name = f"down_{level}_{self.blocks_per_level}"
                encoder.append(Block(name, (resample("down", channels),)))
                skips.append(channels)

        middle = Block(
            "middle",
            (
                Unit("residual", "residual_1", channels, channels),
                Unit("attention", "attention", channels, channels),
                Unit("residual", "residual_2", channels, channels),
            ),
        )

        for level in range(deepest, -1, -1):
            width = self.level_channels[level]
            for index in range(self.blocks_per_level + 1):
                units = (Unit("residual", "residual", channels + skips.pop(), width), *attention(level, width))
                channels = width
                if level > 0 and index == self.blocks_per_level:
                    units = (*units, resample("up", channels))
                decoder.append(Block(f"up_{level}_{index}", units))

        return Plan(tuple(encoder), middle, tuple(decoder))

    def embedder(self, name: str = "embedding") -> nn.Module:
        return _Embedding(self, name=name)

    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> np.ndarray:
        """PyTorch's default laws, as the original starts from.

        Kernels and biases are uniform in +-1/sqrt(fan_in), the class table is standard normal, norms are the identity,
        and the last layer of every block and of the network is zero, so that the fresh network puts out zero.
        """
        *_, layer, name = path.split("/")
        if "norm" in layer:
            return np.full(uniform.shape, 1.0 if name == "scale" else 0.0, np.float32)
        if name == "table":
            return normal()
        if layer in ("conv_2", "projection", "output"):
            return np.zeros(uniform.shape, np.float32)
        kernel = shapes[path.rsplit("/", 1)[0] + "/kernel"]
        return uniform / np.sqrt(np.prod(kernel.shape[:-1]), dtype=np.float32)


class _Embedding(nn.Module):
    """MLP of the sinusoid of c_noise, plus the class's row."""

    config: ADMUNet

    @nn.compact
    def __call__(self, c_noise: Float[Array, " b"], labels: Labels | None) -> Embedding:
        width = 4 * self.config.width
        hidden = Dense(width, name="dense_1")(sinusoid(c_noise, self.config.width))
        embedding = Dense(width, name="dense_2")(nn.silu(hidden))
        if labels is not None:
            table = parameter(self, "table", (self.config.classes or 0, width))
            embedding = embedding + jnp.take(table, labels, axis=0).astype(embedding.dtype)
        return embedding


IMAGENET64 = ADMUNet()
"""The network of the published ImageNet-64 checkpoints."""
LSUN256 = ADMUNet(
    image_size=256,
    width=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    blocks_per_level=2,
    attention_factors=(8, 16, 32),
    classes=None,
    modulation="additive",
)
"""The network of the published LSUN-256 checkpoints."""
