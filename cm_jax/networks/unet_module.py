"""The Flax module of a U-Net."""

import itertools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.networks.layers import (
    AttentionBlock,
    Convolution,
    Embedding,
    Features,
    GroupNorm,
    Outputs,
    ResidualBlock,
    SmoothedConvolution,
)
from cm_jax.networks.plan import Block
from cm_jax.networks.unet_config import UNetConfig
from cm_jax.types import Images, Keys, Labels

Pyramid = Float[Array, "b h3 w3 c3"]
"""Input pyramid: the image, then the output of the last downsampling block."""


class UNetModule(nn.Module):
    """Applies the blocks of the plan."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
    ) -> Images:
        config = self.config
        plan = config.plan()
        embedding = config.embedder()(c_noise, labels)
        if config.interval_embedding:
            embedding += config.embedder("length")(c_noise if length is None else length, None)
        numbers = itertools.count()

        def apply(block: Block, h: Features, pyramid: Pyramid) -> Outputs:
            return _Block(config, block, next(numbers), name=block.name)(h, pyramid, embedding, dropout_keys)

        pyramid = x
        h = Convolution(config.stem_channels, dtype=config.precision, name="stem")(x)
        skips = [h]
        for block in plan.encoder:
            h = apply(block, h, pyramid)
            pyramid = h if block.units[-1].kind == "pyramid" else pyramid
            skips.append(h)
        h = apply(plan.middle, h, pyramid)
        for block in plan.decoder:
            h = apply(block, jnp.concatenate([h, skips.pop()], axis=-1), pyramid)
        return _Head(config, name="head")(h.astype(jnp.float32))


class _Block(nn.Module):
    """The units of one block in turn. Block number and unit index identify a dropout layer."""

    config: UNetConfig
    block: Block
    number: int

    @nn.compact
    def __call__(self, h: Features, pyramid: Pyramid, embedding: Embedding, dropout_keys: Keys | None) -> Outputs:
        config = self.config
        dtype, style = config.precision, config.style
        remat = nn.remat if config.rematerialize else lambda module: module
        for index, unit in enumerate(self.block.units):
            match unit.kind:
                case "residual":
                    h = remat(ResidualBlock)(
                        features=unit.channels_out,
                        dropout_layer=8 * self.number + index,
                        resample=unit.resample,
                        modulation=config.modulation,
                        dropout=config.dropout,
                        dropout_size=config.dropout_size,
                        dtype=dtype,
                        style=style,
                        name=unit.name,
                    )(h, embedding, dropout_keys)
                case "attention":
                    heads = config.heads_for(unit.channels_out)
                    h = remat(AttentionBlock)(heads, config.attention, dtype, style, name=unit.name)(h)
                case "convolution":
                    h = Convolution(unit.channels_out, unit.resample, dtype, name=unit.name)(h)
                case "pyramid":
                    smaller = SmoothedConvolution(unit.channels_out, style.resampling, dtype, name=unit.name)(pyramid)
                    h = (smaller + h) * style.residual_scale
        return h


class _Head(nn.Module):
    """Norm, SiLU, convolution to image channels."""

    config: UNetConfig

    @nn.compact
    def __call__(self, h: Features) -> Outputs:
        norm = GroupNorm(self.config.style, name="norm")
        return Convolution(self.config.image_channels, name="output")(norm(h, silu=True))
