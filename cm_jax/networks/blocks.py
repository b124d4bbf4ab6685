"""The parts of the U-Nets (Dhariwal and Nichol 2021; Song et al. 2021), so that the originals' numbers come out.

Images inside the network are NHWC in the compute precision; norms, softmax and embeddings are float32.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cm_jax.arrays import Keys
from cm_jax.errors import InputError
from cm_jax.networks import winograd
from cm_jax.networks.attention import Implementation, attend
from cm_jax.networks.convolution import convolve_3x3
from cm_jax.networks.fir import Filter, fir_downsample, fir_upsample, smoothed
from cm_jax.networks.precision import product_precision

Features = Float[Array, "b h w c"]
Outputs = Float[Array, "b h2 w2 c2"]
"""Features whose size or number of channels may have changed."""
Embedding = Float[Array, "b t"]
Resample = Literal["down", "up"]
Modulation = Literal["scale_shift", "additive", "normalised"]
"""How the embedding enters a residual block. scale_shift: (1 + s) norm(h) + b, in place of its second norm. additive:
before that norm. normalised: pnorm(s) norm(h) + pnorm(b), which keeps derivatives in time small (sCM, section 4.1)."""

TRANSFORMED = "transformed"
"""The name of a kernel's Winograd transform, beside the kernel."""

NORM_GROUPS = 32
NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Style:
    """In what the blocks of one family of U-Nets differ from another's; the defaults are the ADM U-Net's."""

    least_group: int = 1
    """Channels in a norm group, at least; beyond that there are 32 groups."""
    epsilon: float = NORM_EPSILON
    residual_scale: float = 1.0
    """Of the sum of a block's input and its work."""
    resampling: Filter = "plain"
    resampled_skip: bool = False
    """A block that resamples has a 1x1 convolution on its skip, whatever its channels."""

    def groups(self, channels: int) -> int:
        return min(NORM_GROUPS, channels // self.least_group)


ADM = Style()


def parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    """A module's parameter; zeros where it is being made, for `UNet.shapes`. Raises InputError for another shape.

    Flax's own `param` traces an initialiser, and the splitting of its key, for each of hundreds of parameters whenever
    the network is traced: a third of that time.
    """
    if not module.has_variable("params", name):
        module.put_variable("params", name, jnp.zeros(shape))
    found = module.get_variable("params", name)
    if found.shape != shape:
        path = "/".join((*module.path, name))
        raise InputError(f"The parameter {path} has shape {list(found.shape)}, and this network wants {list(shape)}.")
    return found


def sinusoid(time: Float[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """[cos(t w_k), sin(t w_k)] with w_k = 10000^(-k / half), k = 0 ... half - 1; a zero closes an odd width.

    The exponents are rounded to float32 as PyTorch rounds them: t reaches 1500, so their last bit is visible.
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
    """Every pixel becomes a 2x2 square."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def resampled(x: Features, resample: Resample | None, by: Filter = "plain") -> Outputs:
    if resample is None:
        return x
    halve, double = (fir_downsample, fir_upsample) if by == "fir" else (downsample, upsample)
    return halve(x) if resample == "down" else double(x)


def pixel_norm(values: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Values over their root mean square, image by image."""
    return values * jax.lax.rsqrt(jnp.square(values).mean(-1, keepdims=True) + 1e-8)


def dropped_out(x: Features, rate: float, keys: Keys | None, place: int) -> Features:
    """Inverted dropout, every image with its own key; `place` numbers the layers. No keys: the identity."""
    if keys is None or rate == 0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Dense(nn.Module):
    """x W + b over the last axis; over pixels it is a 1x1 convolution."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = parameter(self, "kernel", (x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        product = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype), precision=product_precision(self.dtype))
        return product + bias.astype(self.dtype)


class Convolution(nn.Module):
    """A 3x3 convolution with bias; `down` halves the image by stride, `up` doubles it beforehand.

    Where its parameters hold the kernel's Winograd transform too (`UNet.accelerated`), that is used.
    """

    features: int
    resample: Resample | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Outputs:
        kernel = parameter(self, "kernel", (3, 3, x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        x = upsample(x) if self.resample == "up" else x
        x = x.astype(self.dtype)
        if self.has_variable("params", TRANSFORMED):
            return winograd.convolve(x, self.get_variable("params", TRANSFORMED)) + bias
        stride = 2 if self.resample == "down" else 1
        return convolve_3x3(x, kernel, stride=stride) + bias.astype(self.dtype)


class SmoothedConvolution(nn.Module):
    """A filter, then a 3x3 convolution with stride 2; zeros are put around the image once, for both (StyleGAN2)."""

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
    """Group normalisation, then scale y + shift per channel where those are given.

    Means and squared deviations are taken per channel and then per group. The deviations are those from the channel's
    mean, because sums of squares would cancel in float32.
    """

    style: Style = ADM

    @nn.compact
    def __call__(
        self, x: Features, scale: Float[Array, "b c"] | None = None, shift: Float[Array, "b c"] | None = None
    ) -> Features:
        channels = x.shape[-1]
        groups = self.style.groups(channels)
        gain = parameter(self, "scale", (channels,))
        bias = parameter(self, "bias", (channels,))
        pixels = x.astype(jnp.float32)
        mean = pixels.mean((1, 2))
        variance = jnp.square(pixels - mean[:, None, None]).mean((1, 2))
        group_mean = _group_mean(mean, groups)
        group_variance = _group_mean(variance + jnp.square(mean - group_mean), groups)
        factor = gain * jax.lax.rsqrt(group_variance + self.style.epsilon)
        if scale is not None and shift is not None:
            factor, bias = factor * scale, bias * scale + shift
        bias = jnp.broadcast_to(bias, factor.shape)
        normal = (pixels - group_mean[:, None, None]) * factor[:, None, None] + bias[:, None, None]
        return normal.astype(x.dtype)


def _group_mean(values: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """Every channel's value replaced by the mean over its group of neighbouring channels."""
    b, c = values.shape
    means = values.reshape(b, groups, c // groups).mean(-1)
    return jnp.repeat(means, c // groups, axis=1)


class ResidualBlock(nn.Module):
    """skip(x) + conv(act(norm(conv(act(norm(x))), embedding))), resampled before the first convolution."""

    features: int
    place: int
    resample: Resample | None = None
    modulation: Modulation = "scale_shift"
    dropout: float = 0.0
    dropout_size: int | None = None
    dtype: DTypeLike = jnp.float32
    style: Style = ADM

    @nn.compact
    def __call__(self, x: Features, embedding: Embedding, dropout_keys: Keys | None = None) -> Outputs:
        style = self.style
        h = resampled(nn.silu(GroupNorm(style, name="norm_1")(x)), self.resample, style.resampling)
        x = resampled(x, self.resample, style.resampling)
        h = Convolution(self.features, dtype=self.dtype, name="conv_1")(h)

        width = self.features if self.modulation == "additive" else 2 * self.features
        modulation = Dense(width, name="embedding")(nn.silu(embedding))
        norm = GroupNorm(style, name="norm_2")
        if self.modulation == "additive":
            h = norm(h + modulation[:, None, None].astype(h.dtype))
        else:
            scale, shift = jnp.split(modulation, 2, axis=1)
            normalised = self.modulation == "normalised"
            h = norm(h, pixel_norm(scale), pixel_norm(shift)) if normalised else norm(h, 1 + scale, shift)
        h = nn.silu(h)
        if self.dropout_size is None or max(h.shape[1:3]) <= self.dropout_size:
            h = dropped_out(h, self.dropout, dropout_keys, self.place)
        h = Convolution(self.features, dtype=self.dtype, name="conv_2")(h)

        if x.shape[-1] != self.features or (self.resample and style.resampled_skip):
            x = Dense(self.features, dtype=self.dtype, name="skip")(x)
        return (x + h) * style.residual_scale


class AttentionBlock(nn.Module):
    """x + projection(attention(norm(x))) over all pixels; queries, keys and values are equal thirds, head by head."""

    heads: int
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32
    style: Style = ADM

    @nn.compact
    def __call__(self, x: Features) -> Features:
        b, h, w, c = x.shape
        thirds = Dense(3 * c, dtype=self.dtype, name="qkv")(GroupNorm(self.style, name="norm")(x).reshape(b, h * w, c))
        query, key, value = (part.reshape(b, h * w, self.heads, -1) for part in jnp.split(thirds, 3, axis=-1))
        mixed = attend(query, key, value, self.implementation).reshape(b, h, w, c)
        return (x + Dense(c, dtype=self.dtype, name="projection")(mixed)) * self.style.residual_scale
