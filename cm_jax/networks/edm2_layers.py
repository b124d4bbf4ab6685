"""Magnitude-preserving layers of EDM2's U-Net (Karras et al. 2024, appendix B)."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cm_jax.networks.layers import UNCERTAINTY_FEATURES, Embedding, Features, parameter
from cm_jax.networks.operations import convolve_3x3, multiply

_EPSILON = 1e-4
"""Added to root mean squares, not under the root."""
Variant = Literal["edm2", "trigflow"]
"""trigflow: sinusoids in place of random Fourier features, and modulation by a normalized scale and shift."""


def normalize(x: Array, axes: Any) -> Array:
    """x / (1e-4 + rms(x)) in float32, with the root mean square over `axes`."""
    x = x.astype(jnp.float32)
    return x / (_EPSILON + jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(axes), keepdims=True)))


def mix(a: Array, b: Array, share: float) -> Array:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), with the magnitude of a and b (EDM2, equation 88)."""
    scale = math.hypot(1 - share, share)
    return a * ((1 - share) / scale) + b * (share / scale)


def concatenate(a: Features, b: Float[Array, "b h w d"], share: float) -> Float[Array, "b h w c3"]:
    """Channels of a, then of b, scaled so that the share of b in the magnitude of both is t (EDM2, equation 103)."""
    channels = a.shape[-1], b.shape[-1]
    scale = math.sqrt(sum(channels)) / math.hypot(1 - share, share)
    return jnp.concatenate(
        [a * (scale * (1 - share) / math.sqrt(channels[0])), b * (scale * share / math.sqrt(channels[1]))], axis=-1
    )


def silu(x: Array) -> Array:
    """SiLU divided by its root mean square for normal inputs (EDM2, equation 81)."""
    return jax.nn.silu(x) / 0.596


def effective(kernel: Array, gain: Array | float = 1.0) -> Array:
    """gain w / (1e-4 sqrt(n) + |w|) for every output channel with n inputs, in float32 (EDM2, equation 47)."""
    inputs = math.prod(kernel.shape[:-1])
    return normalize(kernel, range(kernel.ndim - 1)) * (gain / math.sqrt(inputs))


def time_features(variant: Variant, time: Array, frequencies: Array, phases: Array | None) -> Array:
    """sqrt(2) cos(t w + p) with random w and p, or sqrt(2) [cos(t w), sin(t w)]; neither is trained."""
    angles = time[:, None] * jax.lax.stop_gradient(frequencies).astype(jnp.float32)
    if variant == "edm2":
        assert phases is not None
        return math.sqrt(2) * jnp.cos(angles + jax.lax.stop_gradient(phases).astype(jnp.float32))
    return math.sqrt(2) * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class Linear(nn.Module):
    """x times a normalized kernel: over the last axis, or as a 3x3 convolution."""

    features: int
    window: Literal[1, 3] = 1
    with_gain: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        inputs = (x.shape[-1],) if self.window == 1 else (3, 3, x.shape[-1])
        kernel = parameter(self, "kernel", (*inputs, self.features))
        gain = parameter(self, "gain", ()) if self.with_gain else 1.0
        weights = effective(kernel, gain).astype(self.dtype)
        x = x.astype(self.dtype)
        return multiply(x, weights) if self.window == 1 else convolve_3x3(x, weights)


class TimeFeatures(nn.Module):
    """Features of c_noise, with their frequencies and phases as parameters."""

    width: int
    variant: Variant

    @nn.compact
    def __call__(self, time: Float[Array, " b"]) -> Embedding:
        random = self.variant == "edm2"
        frequencies = parameter(self, "frequencies", (self.width if random else self.width // 2,))
        phases = parameter(self, "phases", (self.width,)) if random else None
        return time_features(self.variant, time, frequencies, phases)


class Uncertainty(nn.Module):
    """The parameters of `EDM2UNet.log_variance`."""

    variant: Variant

    @nn.compact
    def __call__(self, time: Float[Array, " b"]) -> Array:
        random = self.variant == "edm2"
        frequencies = parameter(self, "frequencies", (UNCERTAINTY_FEATURES if random else UNCERTAINTY_FEATURES // 2,))
        phases = parameter(self, "phases", (UNCERTAINTY_FEATURES,)) if random else None
        return Linear(1, name="output")(time_features(self.variant, time, frequencies, phases))
