"""NCSN++ and DDPM++, the U-Nets of CIFAR-10 (Song et al. 2021, appendix H; EDM, appendix F.2).

`NCSNPP` is the network of all published CIFAR-10 consistency models, `DDPMPP` that of EDM's variance-preserving
setting. Their c_noise is ln sigma / 4: use a preconditioning with time_factor=EDM_TIME.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.networks.layers import Dense, Embedding, Filter, Modulation, Style, augmented, class_embedding, parameter
from cm_jax.networks.unet import UNet
from cm_jax.types import ImageSize, Labels

TimeEmbedding = Literal["fourier", "positional"]


@dataclasses.dataclass(frozen=True)
class SongUNet(UNet):
    """F(params, c_in x, c_noise, labels): NCSN++ with the default settings, DDPM++ with others.

    Residual sums are divided by sqrt(2); attention has one head. Raises InputError for settings that cannot be built.
    """

    image_size: ImageSize = 32
    image_channels: int = 3
    base_channels: int = 128
    channel_mult: tuple[float, ...] = (2, 2, 2)
    blocks_per_level: int = 4
    attention_factors: tuple[int, ...] = (2,)
    embedding: TimeEmbedding = "fourier"
    """Embedding of c_noise: random Fourier features, or sinusoids of fixed frequencies."""
    fourier_scale: float = 16.0
    """Standard deviation of the random frequencies, which are not trained: 16 in NCSN++, 0.02 in iCT."""
    resampling: Filter = "fir"
    """Filter for downsampling and upsampling."""
    pyramid: bool = True
    """Add the downsampled image to the features of every encoder level."""
    label_embedding: Literal["table", "linear"] = dataclasses.field(default="table", kw_only=True)
    """table: one vector per class. linear: a layer with bias of one-hot labels times sqrt(classes), as in EDM."""
    modulation: Modulation = dataclasses.field(default="additive", kw_only=True)

    def _problems(self) -> Iterator[str]:
        if min(*self.level_channels, self.base_channels) < 4:
            yield f"base_channels and the channels of every level must be at least 4 (got {self.level_channels})"
            return
        if self.embedding == "positional" and self.base_channels % 2:
            yield f"a positional embedding needs an even number of base_channels (got {self.base_channels})"
        if not 0 < self.fourier_scale < np.inf:
            yield f"fourier_scale must be positive (got {self.fourier_scale})"
        yield from self._norm_problems()

    @property
    def style(self) -> Style:
        return Style(
            min_group_size=4,
            epsilon=1e-6,
            residual_scale=2**-0.5,
            decoder_attention="last",
            pyramid=self.pyramid,
            resampling=self.resampling,
            skip_conv=True,
        )

    @property
    def stem_channels(self) -> int:
        return self.base_channels

    def heads_for(self, channels: int) -> int:
        return 1

    def embedder(self, name: str = "embedding") -> nn.Module:
        return _Embedding(self, name=name)

    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> Any:
        """The initialization of NCSN++ and EDM.

        Kernels are uniform with variance 1 / mean(fan_in, fan_out), times 0.1 for queries, keys and values, and times
        1e-10 for the last layer of every block and of the network. Biases are zero, norms the identity. The class table
        is initialized like a dense layer on one-hot labels scaled by sqrt(classes) (EDM).
        """
        *_, layer, name = path.split("/")
        shape = uniform.shape
        if name in ("scale", "bias"):
            return np.full(shape, 1.0 if name == "scale" else 0.0, np.float32)
        if name == "frequencies":
            return self.fourier_scale * normal()
        window = int(np.prod(shape[:-2]))
        fan_out = shape[-1] // 3 if layer == "qkv" else shape[-1]
        factor = {"qkv": 0.1, "conv_2": 1e-10, "projection": 1e-10, "output": 1e-10}.get(layer, 1.0)
        factor = float(shape[0]) if name == "table" else factor
        return uniform * np.float32(np.sqrt(3 * factor / (window * (shape[-2] + fan_out) / 2)))


class _Embedding(nn.Module):
    """An MLP of the embedding of c_noise plus the class embedding (as in EDM; NCSN++ itself has no classes)."""

    config: SongUNet

    @nn.compact
    def __call__(
        self, c_noise: Float[Array, " b"], labels: Labels | None, augmentation: Float[Array, "b a"] | None
    ) -> Embedding:
        config = self.config
        if config.embedding == "fourier":
            features = fourier(c_noise, parameter(self, "frequencies", (config.base_channels,)))
        else:
            features = positional(c_noise, config.base_channels)
        width, classes = features.shape[1], config.classes or 0
        if labels is not None and config.label_embedding == "table":
            features = features + class_embedding(parameter(self, "table", (classes, width)), labels)
        elif labels is not None:
            one_hot = jax.nn.one_hot(labels, classes) * np.float32(np.sqrt(classes))
            features = features + Dense(width, name="label")(one_hot)
        features = augmented(self, features, augmentation, config.augment_dim)
        hidden = Dense(4 * config.base_channels, name="dense_1")(features)
        return Dense(4 * config.base_channels, name="dense_2")(nn.silu(hidden))


def fourier(time: Float[Array, " b"], frequencies: Float[Array, " w"]) -> Float[Array, "b 2*w"]:
    """[sin(2 pi t w), cos(2 pi t w)]; the frequencies get no gradient."""
    angles = time[:, None] * jax.lax.stop_gradient(frequencies) * (2 * np.pi)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def positional(time: Float[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """[sin(t w_k), cos(t w_k)] with w_k from 1 down to 1/10000: 10000^(-k / (half - 1)), k = 0 ... half - 1."""
    frequencies = np.geomspace(1, 1e-4, width // 2, dtype=np.float32)
    angles = time[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


NCSNPP = SongUNet()
"""NCSN++ at 32 pixels: the published CIFAR-10 consistency models and their EDM teacher. iCT uses fourier_scale=0.02;
iCT-deep has 8 blocks per level."""
DDPMPP = SongUNet(embedding="positional", resampling="plain", pyramid=False)
"""DDPM++ at 32 pixels: EDM's variance-preserving network, which ECT fine-tunes. sCM adds modulation="normalized"."""
