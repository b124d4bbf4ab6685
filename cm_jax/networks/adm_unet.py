"""The ADM U-Net of the published consistency models (Dhariwal and Nichol 2021; CM, appendix C)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from cm_jax.networks.layers import (
    NORM_EPSILON,
    NORM_GROUPS,
    Dense,
    Embedding,
    Style,
    augmented,
    class_embedding,
    parameter,
    sinusoid,
)
from cm_jax.networks.unet import UNet
from cm_jax.types import ImageSize, Labels


@dataclasses.dataclass(frozen=True)
class ADMUNet(UNet):
    """F(params, c_in x, c_noise, labels): the ADM U-Net with the options of OpenAI's implementation.

    The defaults are the published ImageNet-64 network. Raises InputError for settings that cannot be built.
    """

    image_size: ImageSize = 64
    image_channels: int = 3
    base_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    blocks_per_level: int = 3
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_dim: int | None = 64
    """Channels of an attention head; None if `heads` sets their number instead."""
    heads: int | None = None
    """Number of attention heads on every level; None if `head_dim` is set."""
    resampling: Literal["residual", "convolution"] = "residual"
    """Resample in a residual block or with a 3x3 convolution."""
    variant: Literal["openai", "edm"] = dataclasses.field(default="openai", kw_only=True)
    """How narrow levels are built. openai: 32 norm groups, and attention everywhere asked for. edm: at least 4 channels
    per norm group, and no attention on levels with fewer channels than head_dim."""
    classes: int | None = dataclasses.field(default=1000, kw_only=True)
    norm_groups: int = dataclasses.field(default=NORM_GROUPS, kw_only=True)
    """Number of groups of every group norm: 32, or another one for networks of diffusers."""
    norm_epsilon: float = dataclasses.field(default=NORM_EPSILON, kw_only=True)
    """Term added to the variance in every group norm."""

    def _problems(self) -> Iterator[str]:
        if (self.head_dim is None) == (self.heads is None):
            yield f"give head_dim or heads, not both or neither (got {self.head_dim} and {self.heads})"
            return
        if (self.head_dim if self.head_dim is not None else self.heads or 0) < 1:
            yield f"head_dim and heads must be positive (got {self.head_dim} and {self.heads})"
            return
        if self.norm_groups < 1 or not self.norm_epsilon > 0:
            yield f"norm_groups and norm_epsilon must be positive (got {self.norm_groups} and {self.norm_epsilon})"
            return
        if self.variant == "edm":
            if (self.norm_groups, self.norm_epsilon) != (NORM_GROUPS, NORM_EPSILON):
                yield f"the variant edm has norm_groups {NORM_GROUPS} and norm_epsilon {NORM_EPSILON}"
                return
            yield from self._norm_problems()
            yield from self._head_problems()
            return
        for level, channels in enumerate(self.level_channels):
            if channels % self.norm_groups or not channels:
                yield f"level {level} has {channels} channels, not a multiple of the {self.norm_groups} norm groups"
            attends = 2**level in self.attention_factors or level == len(self.channel_mult) - 1
            if attends and channels % (self.head_dim or self.heads or 1):
                heads = f"heads of {self.head_dim} channels" if self.head_dim else f"{self.heads} heads"
                yield f"level {level} has {channels} channels, which do not split into {heads}"

    @property
    def style(self) -> Style:
        smallest = 4 if self.variant == "edm" else 1
        return Style(smallest, self.norm_groups, self.norm_epsilon, resampling_unit=self.resampling)

    @property
    def stem_channels(self) -> int:
        return self.level_channels[0]

    def heads_for(self, channels: int) -> int:
        return self.heads or channels // (self.head_dim or channels)

    def embedder(self, name: str = "embedding") -> nn.Module:
        return _Embedding(self, name=name)

    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> Any:
        """PyTorch's default initialization, as in OpenAI's implementation.

        Kernels and biases are uniform in +-1/sqrt(fan_in), the class table is standard normal, norms are the identity,
        and the last layer of every block and of the network is zero, so that a fresh network outputs zero.
        """
        *_, layer, name = path.split("/")
        if "norm" in layer:
            return np.full(uniform.shape, 1.0 if name == "scale" else 0.0, np.float32)
        if name == "table":
            return normal()
        if layer in ("conv_2", "projection", "output") or name == "augment":
            return np.zeros(uniform.shape, np.float32)
        kernel = shapes[path.rsplit("/", 1)[0] + "/kernel"]
        return uniform / np.sqrt(np.prod(kernel.shape[:-1]), dtype=np.float32)


class _Embedding(nn.Module):
    """An MLP of the sinusoidal embedding of c_noise, plus the class embedding."""

    config: ADMUNet

    @nn.compact
    def __call__(
        self, c_noise: Float[Array, " b"], labels: Labels | None, augmentation: Float[Array, "b a"] | None
    ) -> Embedding:
        channels = 4 * self.config.base_channels
        features = sinusoid(c_noise, self.config.base_channels)
        features = augmented(self, features, augmentation, self.config.augment_dim)
        hidden = Dense(channels, name="dense_1")(features)
        embedding = Dense(channels, name="dense_2")(nn.silu(hidden))
        if labels is not None:
            table = parameter(self, "table", (self.config.classes or 0, channels))
            embedding = embedding + class_embedding(table, labels)
        return embedding


IMAGENET64 = ADMUNet()
"""The network of the published ImageNet-64 checkpoints."""
LSUN256 = ADMUNet(
    image_size=256,
    base_channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    blocks_per_level=2,
    attention_factors=(8, 16, 32),
    classes=None,
    modulation="additive",
)
"""The network of the published LSUN-256 checkpoints."""
