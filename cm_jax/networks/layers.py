"""Layers of the U-Nets (Dhariwal and Nichol 2021; Song et al. 2021).

Feature maps are NHWC in the compute precision; norms, softmax and embeddings are float32.
"""

import dataclasses
import functools
import itertools
import operator
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cm_jax.errors import InputError
from cm_jax.networks.operations import Implementation, attend, concatenated, convolve_3x3, group_norm, multiply
from cm_jax.types import Keys, Labels

Features = Float[Array, "b h w c"]
Outputs = Float[Array, "b h2 w2 c2"]
"""Features with another size or number of channels."""
Joined = Float[Array, "b h w j"]
"""Features with another number of channels."""
Embedding = Float[Array, "b t"]
Resample = Literal["down", "up"]
Filter = Literal["fir", "plain"]
"""fir: [1, 3, 3, 1]. plain: [1, 1], the mean of two pixels."""
Modulation = Literal["scale_shift", "additive", "normalized"]
"""How the embedding (s, b) enters a residual block. scale_shift: (1 + s) norm(h) + b in its second norm. additive:
added to h before it. normalized: pnorm(s) norm(h) + pnorm(b), which bounds time derivatives (sCM, section 4.1)."""

NORM_GROUPS = 32
NORM_EPSILON = 1e-5
UNCERTAINTY_FEATURES = 128
"""Width of the time embedding of uncertainty heads."""


@dataclasses.dataclass(frozen=True)
class Style:
    """Settings that differ between families of U-Nets. The defaults are those of the ADM U-Net."""

    min_group_size: int = 1
    """Smallest number of channels in a norm group."""
    max_groups: int = NORM_GROUPS
    """Largest number of norm groups."""
    epsilon: float = NORM_EPSILON
    residual_scale: float = 1.0
    """Factor applied to the sum of skip and residual branch."""
    decoder_attention: Literal["every", "last"] = "every"
    """Decoder blocks with attention, on a level with attention."""
    resampling_unit: Literal["residual", "convolution"] = "residual"
    """Unit that resamples: a residual block or a 3x3 convolution."""
    pyramid: bool = False
    """Whether the downsampled image is added to the features of every encoder level."""
    resampling: Filter = "plain"
    skip_conv: bool = False
    """Whether a resampling block has a 1x1 convolution on its skip even if the channels stay the same."""

    def groups(self, channels: int) -> int:
        return min(self.max_groups, channels // self.min_group_size)


def parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    """Get a module's parameter; zeros during `UNet.shapes`. Raises InputError for another shape.

    Flax's `param` traces an initializer and a key split for every parameter whenever the network is traced, which is 30
    % of the tracing time.
    """
    if not module.has_variable("params", name):
        module.put_variable("params", name, jnp.zeros(shape))
    found = module.get_variable("params", name)
    if found.shape != shape:
        path = "/".join((*module.path, name))
        raise InputError(f"Expected parameter {path} of shape {list(shape)}, got {list(found.shape)}.")
    return found


def sinusoid(time: Float[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """[cos(t w_k), sin(t w_k)] with w_k = 10000^(-k / half), k = 0 ... half - 1; an odd width is padded with a zero.

    The exponents are rounded to float32 as in PyTorch: t reaches 1500, so their last bit affects the result.
    """
    half = width // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents, dtype=np.float64).astype(np.float32)
    angles = time[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1), ((0, 0), (0, width % 2)))


def downsample(x: Features) -> Outputs:
    """Mean of every 2x2 square."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Features) -> Outputs:
    """Repeat every pixel in a 2x2 square."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def smoothed(x: Float[Array, "b h w c"], taps: Filter = "fir") -> Float[Array, "b h+1 w+1 c"]:
    """Filtered values at the corners between pixels, borders included: one more than pixels along each axis."""
    weights = (1, 3, 3, 1) if taps == "fir" else (1, 1)
    edge = len(weights) // 2
    for axis in (1, 2):
        padded = jnp.pad(x, [(edge, edge) if i == axis else (0, 0) for i in range(4)])
        count = x.shape[axis] + 1
        shifted = (jnp.take(padded, jnp.arange(start, start + count), axis=axis) for start in range(len(weights)))
        x = sum((weight * part for weight, part in zip(weights, shifted, strict=True)), jnp.zeros((), x.dtype))
        x = x / sum(weights)
    return x


def fir_downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Downsample: out[i] = (x[2i-1] + 3 x[2i] + 3 x[2i+1] + x[2i+2]) / 8 along each axis."""
    return smoothed(x)[:, 1::2, 1::2]


def fir_upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Upsample: out[2i] = (x[i-1] + 3 x[i]) / 4 and out[2i+1] = (3 x[i] + x[i+1]) / 4 along each axis."""
    for axis in (1, 2):
        count = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        before, after = (jnp.take(padded, jnp.arange(start, start + count), axis=axis) for start in (0, 2))
        pairs = jnp.stack([(before + 3 * x) / 4, (3 * x + after) / 4], axis=axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * count, *x.shape[axis + 1 :])
    return x


def resampled(x: Features, resample: Resample | None, by: Filter = "plain") -> Outputs:
    """Downsampled, upsampled or unchanged features."""
    if resample is None:
        return x
    down, up = (fir_downsample, fir_upsample) if by == "fir" else (downsample, upsample)
    return down(x) if resample == "down" else up(x)


def pixel_norm(values: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Values divided by their root mean square over channels."""
    return values * jax.lax.rsqrt(jnp.square(values).mean(-1, keepdims=True) + 1e-8)


def class_embedding(table: Float[Array, "k t"], labels: Labels) -> Float[Array, "b t"]:
    """Rows of the table; zeros for the label k, which stands for no class."""
    return jnp.take(table, labels, axis=0, mode="fill", fill_value=0)


def dropout(x: Features, rate: float, keys: Keys | None, layer: int) -> Features:
    """Inverted dropout with one key per image; `layer` is folded into the keys. Without keys: the identity."""
    if keys is None or rate == 0:
        return x
    share = np.float32(1 - rate)
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), share, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Dense(nn.Module):
    """x W + b over the last axis; on feature maps a 1x1 convolution."""

    features: int
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... i"], *more: Float[Array, "... _"]) -> Float[Array, "... o"]:
        """The layer applied to x and `more` concatenated along the last axis, without copying them."""
        parts = [part.astype(self.dtype) for part in (x, *more)]
        *starts, channels = itertools.accumulate(part.shape[-1] for part in parts)
        kernel = parameter(self, "kernel", (channels, self.features)).astype(self.dtype)
        result = functools.reduce(operator.add, map(multiply, parts, jnp.split(kernel, starts)))
        return result + parameter(self, "bias", (self.features,)).astype(self.dtype) if self.use_bias else result


def augmented(
    module: nn.Module, features: Float[Array, "b t"], augmentation: Float[Array, "b a"] | None, augment_dim: int
) -> Float[Array, "b t"]:
    """Features plus the embedding of the augmentation parameters, where the network of this module has one (EDM)."""
    if not augment_dim:
        return features
    kernel = parameter(module, "augment", (augment_dim, features.shape[1]))
    return features if augmentation is None else features + multiply(augmentation, kernel)


class Convolution(nn.Module):
    """A 3x3 convolution with bias; `down` has stride 2, `up` upsamples first."""

    features: int
    resample: Resample | None = None
    dtype: DTypeLike = jnp.float32

    def __call__(self, x: Features) -> Outputs:
        result, bias = self.without_bias(x)
        return result + bias.astype(self.dtype)

    def without_bias(self, x: Features) -> tuple[Outputs, Float[Array, " c2"]]:
        """(the convolution without its bias, the bias), for a norm that adds the bias."""
        kernel = parameter(self, "kernel", (3, 3, x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        x = upsample(x) if self.resample == "up" else x
        x = x.astype(self.dtype)
        return convolve_3x3(x, kernel, stride=2 if self.resample == "down" else 1), bias


class SmoothedConvolution(nn.Module):
    """A binomial filter, then a 3x3 convolution with stride 2; the image is zero-padded once for both (StyleGAN2)."""

    features: int
    by: Filter
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Outputs:
        kernel = parameter(self, "kernel", (3, 3, x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        smooth = smoothed(x.astype(self.dtype), self.by)
        return convolve_3x3(smooth, kernel, stride=2, padding=0) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalization of x + offset, then optionally scale y + shift per channel, then optionally SiLU."""

    style: Style = Style()

    @nn.compact
    def __call__(
        self,
        x: Features,
        *more: Float[Array, "b h w _"],
        scale: Float[Array, "b _"] | None = None,
        shift: Float[Array, "b _"] | None = None,
        offset: Float[Array, "b _"] | None = None,
        silu: bool = False,
    ) -> Joined:
        """The layer applied to x and `more` concatenated along channels, without copying them."""
        b, channels = x.shape[0], sum(part.shape[-1] for part in (x, *more))
        gain = parameter(self, "scale", (channels,))
        bias = parameter(self, "bias", (channels,))
        if scale is not None and shift is not None:
            gain, bias = gain * scale, bias * scale + shift
        gain, bias = (jnp.broadcast_to(values, (b, channels)) for values in (gain, bias))
        groups, epsilon = self.style.groups(channels), self.style.epsilon
        return group_norm(x, offset, gain, bias, *more, groups=groups, epsilon=epsilon, silu=silu)


class ResidualBlock(nn.Module):
    """skip(x) + conv(act(norm(conv(act(norm(x))), embedding))), resampled before the first convolution."""

    features: int
    dropout_layer: int
    resample: Resample | None = None
    modulation: Modulation = "scale_shift"
    dropout: float = 0.0
    dropout_size: int | None = None
    dtype: DTypeLike = jnp.float32
    style: Style = Style()

    @nn.compact
    def __call__(
        self, x: Features, embedding: Embedding, dropout_keys: Keys | None = None, joined: Joined | None = None
    ) -> Outputs:
        """joined: features concatenated to x along channels."""
        style, parts = self.style, [x] if joined is None else concatenated(x, joined)
        h = resampled(GroupNorm(style, name="norm_1")(*parts, silu=True), self.resample, style.resampling)
        h, bias = Convolution(self.features, dtype=self.dtype, name="conv_1").without_bias(h)
        offset = jnp.broadcast_to(bias, (h.shape[0], self.features))

        width = self.features if self.modulation == "additive" else 2 * self.features
        modulation = Dense(width, name="embedding")(nn.silu(embedding))
        norm = GroupNorm(style, name="norm_2")
        if self.modulation == "additive":
            h = norm(h, offset=offset + modulation, silu=True)
        else:
            scale, shift = jnp.split(modulation, 2, axis=1)
            normalized = self.modulation == "normalized"
            scale, shift = (pixel_norm(scale), pixel_norm(shift)) if normalized else (1 + scale, shift)
            h = norm(h, scale=scale, shift=shift, offset=offset, silu=True)
        if self.dropout_size is None or max(h.shape[1:3]) <= self.dropout_size:
            h = dropout(h, self.dropout, dropout_keys, self.dropout_layer)
        h = Convolution(self.features, dtype=self.dtype, name="conv_2")(h)

        skip = Dense(self.features, dtype=self.dtype, name="skip")
        if sum(part.shape[-1] for part in parts) == self.features and not (self.resample and style.skip_conv):
            x = resampled(jnp.concatenate(parts, axis=-1), self.resample, style.resampling)
        elif self.resample == "up" and style.resampling == "plain":
            x = resampled(skip(*parts), "up")  # equal, with 25 % of the multiplications
        else:
            x = skip(*(resampled(part, self.resample, style.resampling) for part in parts))
        return (x + h) * style.residual_scale


class AttentionBlock(nn.Module):
    """x + projection(attention(norm(x))) over all pixels. Channels of qkv: queries, keys, values, each head by head."""

    heads: int
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32
    style: Style = Style()

    @nn.compact
    def __call__(self, x: Features) -> Features:
        b, h, w, c = x.shape
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(GroupNorm(self.style, name="norm")(x).reshape(b, h * w, c))
        mixed = attend(qkv, self.heads, self.implementation).reshape(b, h, w, c)
        return (x + Dense(c, dtype=self.dtype, name="projection")(mixed)) * self.style.residual_scale
