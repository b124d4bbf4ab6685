"""EDM2's magnitude-preserving U-Net, and its TrigFlow variant (Karras et al. 2024; Lu and Song 2024, section 4.1).

No layer has a bias and no norm has parameters. Each kernel is divided by its norm when it is used, so that every layer
preserves the magnitude of its input. During training the stored kernels are normalized, too (`UNet.constrain`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cm_jax.networks.edm2_layers import (
    Linear,
    TimeFeatures,
    Uncertainty,
    Variant,
    concatenate,
    effective,
    mix,
    normalize,
    silu,
    time_features,
)
from cm_jax.networks.layers import (
    Embedding,
    Features,
    Outputs,
    Style,
    dropout,
    parameter,
    resampled,
)
from cm_jax.networks.operations import Implementation, attend, multiply
from cm_jax.networks.unet import GuidanceEmbedding, UNet
from cm_jax.networks.unet_config import Block, Unit
from cm_jax.types import Images, ImageSize, Keys, Labels, Params, leaves, nested


@dataclasses.dataclass(frozen=True)
class EDM2UNet(UNet):
    """F(params, c_in x, c_noise, labels). The defaults are EDM2-S on ImageNet-64: 280 million parameters.

    Raises InputError for settings that cannot be built.
    """

    image_size: ImageSize = 64
    image_channels: int = 3
    base_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    blocks_per_level: int = 3
    attention_factors: tuple[int, ...] = (4, 8)
    head_dim: int = 64
    """Channels of an attention head. A level with fewer channels has no attention."""
    noise_channels: int | None = None
    """Width of the embedding of c_noise. Default: the channels of the first level."""
    embedding_channels: int | None = None
    """Width of the embedding of the blocks. Default: the channels of the widest level."""
    label_balance: float = 0.5
    """Share of the class embedding in the embedding, from 0 to 1."""
    concat_balance: float = 0.5
    """Share of the skip connections in the decoder's input."""
    residual_balance: float = 0.3
    """Share of the residual branch in the output of a block."""
    attention_balance: float = 0.3
    """Share of attention in the output of an attention block."""
    clip: float = 256.0
    """Outputs of blocks are clipped to [-clip, clip]."""
    variant: Variant = "edm2"
    """edm2, or trigflow for sCM's networks."""
    uncertainty: bool = dataclasses.field(default=True, kw_only=True)
    classes: int | None = dataclasses.field(default=1000, kw_only=True)

    def _problems(self) -> Iterator[str]:
        if self.head_dim < 1:
            yield f"head_dim must be positive (got {self.head_dim})"
            return
        yield from self._head_problems()
        if min(self.embedding_widths) < 4 or self.embedding_widths[0] % 2:
            yield f"noise_channels must be even, and embeddings have at least 4 channels (got {self.embedding_widths})"
        for name in ("label_balance", "concat_balance", "residual_balance", "attention_balance"):
            if not 0 < getattr(self, name) < 1:
                yield f"{name} must lie between 0 and 1 (got {getattr(self, name)})"
        if not 0 < self.clip < math.inf:
            yield f"clip must be positive (got {self.clip})"
        if self.modulation != "scale_shift" or self.augment_dim or self.output_channels:
            yield "this family has no modulation, augment_dim and output_channels of other values: leave them out"

    @property
    def embedding_widths(self) -> tuple[int, int]:
        """Channels of the embedding of c_noise, and of the embedding of the blocks."""
        return self.noise_channels or self.level_channels[0], self.embedding_channels or max(self.level_channels)

    @property
    def style(self) -> Style:
        return Style()

    @property
    def stem_channels(self) -> int:
        return self.level_channels[0]

    def heads_for(self, channels: int) -> int:
        return channels // self.head_dim

    def embedder(self, name: str = "embedding") -> nn.Module:
        return _Embedding(self, name=name)

    def module(self) -> nn.Module:
        return _EDM2Module(self)

    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> Any:
        """Standard normal kernels, gains of 0, and frequencies and phases of random Fourier features (EDM2)."""
        name = path.split("/")[-1]
        if name == "gain":
            return np.zeros(uniform.shape, np.float32)
        if name == "phases":
            return np.pi * (uniform + 1)
        if name == "frequencies":
            count = uniform.size
            return 2 * np.pi * normal() if self.variant == "edm2" else 10000.0 ** (-np.arange(count) / (count - 1))
        return normal()

    def constrain(self, params: Params) -> Params:
        """Kernels with a root mean square of 1 per output channel, as training keeps them (EDM2, equation 66)."""
        return nested(
            {
                path: normalize(leaf, range(leaf.ndim - 1)) if path.endswith("/kernel") and leaf.ndim > 1 else leaf
                for path, leaf in leaves(params)
            }
        )

    def prepare(self, params: Params) -> Params:
        """Float32 parameters: kernels are normalized in float32 before they are cast."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def log_variance(self, params: Params, c_noise: Float[Array, " b"]) -> Float[Array, " b"]:
        """The uncertainty u(sigma) of every noise level, for the loss e^-u (D - x)^2 + u (EDM2, equation 21)."""
        head = params["uncertainty"]
        features = time_features(self.variant, c_noise, head["frequencies"], head.get("phases"))
        return multiply(features, effective(head["output"]["kernel"]))[:, 0]


class _Embedding(nn.Module):
    """silu(mix(noise embedding, class embedding)). The label `classes` stands for no class."""

    config: EDM2UNet

    @nn.compact
    def __call__(self, time: Float[Array, " b"], labels: Labels | None, start: Float[Array, " b"] | None) -> Embedding:
        config = self.config
        noise_width, width = config.embedding_widths
        features = TimeFeatures(noise_width, config.variant, name="features")
        embedding = Linear(width, name="noise")(features(time))
        if config.interval_embedding:
            kernel = parameter(self, "interval", (noise_width, width))
            embedding += 0.0 if start is None else multiply(features(start), kernel)
        if config.classes is not None:
            one_hot = jax.nn.one_hot(labels, config.classes) * math.sqrt(config.classes)
            embedding = mix(embedding, Linear(width, name="label")(one_hot), config.label_balance)
        return silu(embedding)


class _ResidualBlock(nn.Module):
    """mix(skip(x), conv(silu(modulated conv(silu(x))))); the encoder also normalizes every pixel of x."""

    config: EDM2UNet
    unit: Unit
    encoder: bool
    dropout_layer: int

    @nn.compact
    def __call__(self, x: Features, embedding: Embedding, dropout_keys: Keys | None = None) -> Outputs:
        config, width = self.config, self.unit.channels_out
        dtype = jnp.dtype(config.precision)

        def skip(x: Features) -> Outputs:
            return x if x.shape[-1] == width else Linear(width, dtype=dtype, name="skip")(x)

        x = resampled(x, self.unit.resample)
        if self.encoder:
            x = normalize(skip(x), (-1,)).astype(dtype)
        h = Linear(width, 3, dtype=dtype, name="conv_1")(silu(x))
        if config.variant == "edm2":
            scale = 1 + Linear(width, with_gain=True, name="embedding")(embedding)
            h = silu(h * scale[:, None, None].astype(dtype))
        else:
            scale, shift = jnp.split(Linear(2 * width, name="embedding")(embedding), 2, axis=1)
            scale, shift = (normalize(part, (-1,))[:, None, None] for part in (scale, shift))
            h = silu(normalize(h, (-1,)) * scale + shift).astype(dtype)
        if config.dropout_size is None or max(h.shape[1:3]) <= config.dropout_size:
            h = dropout(h, config.dropout, dropout_keys, self.dropout_layer)
        h = Linear(width, 3, dtype=dtype, name="conv_2")(h)
        return mix(x if self.encoder else skip(x), h, config.residual_balance)


class _AttentionBlock(nn.Module):
    """mix(x, projection(attention(x))) with normalized queries, keys and values."""

    heads: int
    balance: float
    implementation: Implementation
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Features) -> Features:
        b, h, w, c = x.shape
        qkv = Linear(3 * c, dtype=self.dtype, name="qkv")(x.reshape(b, h * w, c))
        qkv = normalize(qkv.reshape(b, h * w, 3, self.heads, -1), (-1,)).astype(self.dtype)
        mixed = attend(qkv.reshape(b, h * w, 3 * c), self.heads, self.implementation).reshape(b, h, w, c)
        return mix(x, Linear(c, dtype=self.dtype, name="projection")(mixed), self.balance)


class _Block(nn.Module):
    """The units of one block in turn. Outputs are clipped after each residual block and its attention."""

    config: EDM2UNet
    block: Block
    encoder: bool
    number: int

    @nn.compact
    def __call__(self, h: Features, embedding: Embedding, dropout_keys: Keys | None) -> Outputs:
        config, units = self.config, self.block.units
        remat = nn.remat if config.rematerialize else lambda module: module
        for index, unit in enumerate(units):
            if unit.kind == "attention":
                heads, dtype = config.heads_for(unit.channels_out), config.precision
                block = remat(_AttentionBlock)(heads, config.attention_balance, config.attention, dtype, name=unit.name)
                h = block(h)
            else:
                layer = 8 * self.number + index
                block = remat(_ResidualBlock)(config, unit, self.encoder, layer, name=unit.name)
                h = block(h, embedding, dropout_keys)
            if index + 1 == len(units) or units[index + 1].kind != "attention":
                h = jnp.clip(h, -config.clip, config.clip)
        return h


class _EDM2Module(nn.Module):
    """Applies the blocks of the plan."""

    config: EDM2UNet

    @nn.compact
    def __call__(
        self,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
        augmentation: None = None,
        guidance: Float[Array, " b"] | None = None,
    ) -> Images:
        del augmentation
        config, plan = self.config, self.config.plan()
        embedding = config.embedder()(c_noise, labels, length)
        if config.guidance_embedding:
            embedding += GuidanceEmbedding(embedding.shape[1], name="guidance")(guidance, c_noise)
        if config.uncertainty:
            Uncertainty(config.variant, name="uncertainty")(c_noise)
        numbers = itertools.count()

        def apply(block: Block, h: Features, encoder: bool) -> Outputs:
            return _Block(config, block, encoder, next(numbers), name=block.name)(h, embedding, dropout_keys)

        ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
        stem = Linear(config.stem_channels, 3, dtype=config.precision, name="stem")
        h = stem(jnp.concatenate([x, ones], axis=-1))
        skips = [h]
        for block in plan.encoder:
            h = apply(block, h, True)
            skips.append(h)
        h = apply(plan.middle, h, False)
        for block in plan.decoder:
            h = apply(block, concatenate(h, skips.pop(), config.concat_balance), False)
        return Linear(config.image_channels, 3, with_gain=True, name="head")(h.astype(jnp.float32))
