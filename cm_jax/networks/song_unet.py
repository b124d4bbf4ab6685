"""The U-Nets of CIFAR-10: NCSN++ and DDPM++ (Song et al. 2021, appendix H; EDM, appendix F.2), as consistency models,
iCT and sCM use them.

Both come from one description: `NCSNPP` is the network of all published CIFAR-10 consistency models, `DDPMPP` that of
EDM's variance-preserving setting. Their clock is ln sigma / 4: give the scalings time_factor=EDM_TIME.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.errors import InputError
from cm_jax.networks.attention import Implementation
from cm_jax.networks.blocks import Dense, Embedding, Modulation, Style, parameter
from cm_jax.networks.fir import Filter
from cm_jax.networks.unet import Block, Plan, UNet, Unit
from cm_jax.types import Labels, Precision

TimeEmbedding = Literal["fourier", "positional"]


@dataclasses.dataclass(frozen=True)
class SongUNet(UNet):
    """F(params, c_in x, c_noise, labels): NCSN++ by default, DDPM++ and what lies between by its options.

    Residual sums are divided by sqrt(2), attention has one head. Raises InputError for a shape that cannot be built.
    """

    image_size: int = 32
    """Height and width that it was trained on; the network itself takes any size that halves often enough."""
    image_channels: int = 3
    width: int = 128
    """Channels of the first convolution, and at multiplier 1; the embedding is four times as wide."""
    channel_mult: tuple[float, ...] = (2, 2, 2)
    """Channels of every level over `width`; the image is halved from each level to the next."""
    blocks_per_level: int = 4
    """iCT-deep doubles it."""
    attention_factors: tuple[int, ...] = (2,)
    """Where attention stands, as factors of down-sampling: at 32 pixels, 2 is attention at resolution 16."""
    classes: int | None = None
    """Number of classes, or None for an unconditional network."""
    interval_embedding: bool = False
    """Whether it is also told the length of an interval, embedded like c_noise and added (MeanFlow)."""
    embedding: TimeEmbedding = "fourier"
    """Waves of c_noise at random frequencies, or at fixed falling ones."""
    fourier_scale: float = 16.0
    """Standard deviation of the random frequencies: 16 originally, 0.02 in iCT. They are not trained."""
    resampling: Filter = "fir"
    """The filter before halving and after doubling."""
    pyramid: bool = True
    """Bring the image down beside the features, level by level, and add it to them."""
    modulation: Modulation = "additive"
    """How the embedding enters a block: additive in the originals, normalised in sCM."""
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

    def _problems(self) -> Iterator[str]:
        """Every way in which the fields contradict each other."""
        if (
            min(self.blocks_per_level, self.image_size, self.image_channels) < 1
            or self.width < 4
            or not self.channel_mult
            or min(self.level_channels) < 4
        ):
            yield (
                "blocks_per_level, image_size and image_channels must be positive, width and the channels of every "
                "level at least 4"
            )
            return
        if self.image_size > 2**13 or self.blocks_per_level > 64 or len(self.channel_mult) > 12:
            yield "image_size may be 8192 at most, blocks_per_level 64, and the levels 12"
            return
        if max(*self.level_channels, self.width, self.image_channels, self.classes or 0) > 2**20:
            yield "channels and classes may be a million at most"
            return
        if self.embedding == "positional" and self.width % 2:
            yield f"a positional embedding needs an even width (got {self.width})"
        if self.fourier_scale <= 0:
            yield f"fourier_scale must be positive (got {self.fourier_scale})"
        channels = {side for block in self.plan().blocks for unit in block.units for side in self._normed(unit)}
        for count in sorted(channels):
            if count % self.style.groups(count):
                yield f"{count} channels somewhere do not split into {self.style.groups(count)} norm groups"
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

    @staticmethod
    def _normed(unit: Unit) -> tuple[int, ...]:
        return () if unit.kind == "pyramid" else (unit.channels_in, unit.channels_out)

    @property
    def style(self) -> Style:
        return Style(
            least_group=4, epsilon=1e-6, residual_scale=2**-0.5, resampling=self.resampling, resampled_skip=True
        )

    @property
    def stem_channels(self) -> int:
        return self.width

    def heads_for(self, channels: int) -> int:
        return 1

    def plan(self) -> Plan:
        """The blocks in the order they are applied, after the stem and before the head."""
        deepest = len(self.channel_mult) - 1
        channels, inputs = self.width, self.image_channels
        skips = [channels]
        encoder, decoder = [], []

        def attention(level: int, width: int) -> tuple[Unit, ...]:
            attends = 2**level in self.attention_factors
            return (Unit("attention", "attention", width, width),) if attends else ()

        for level, width in enumerate(self.level_channels):
            for index in range(self.blocks_per_level):
                units = (Unit("residual", "residual", channels, width), *attention(level, width))
                encoder.append(Block(f"down_{level}_{index}", units))
                channels = width
                skips.append(channels)
            if level < deepest:
                units = (Unit("residual", "downsample", channels, channels, "down"),)
                if self.pyramid:
                    units = (*units, Unit("pyramid", "pyramid", inputs, channels, "down"))
                    inputs = channels
                encoder.append(Block(f"down_{level}_{self.blocks_per_level}", units))
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
                units = (Unit("residual", "residual", channels + skips.pop(), width),)
                channels = width
                if index == self.blocks_per_level:
                    units = (*units, *attention(level, width))
                    if level > 0:
                        units = (*units, Unit("residual", "upsample", channels, channels, "up"))
                decoder.append(Block(f"up_{level}_{index}", units))

        return Plan(tuple(encoder), middle, tuple(decoder))

    def embedder(self, name: str = "embedding") -> nn.Module:
        return _Embedding(self, name=name)

    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> np.ndarray:
        """The original's laws, which are EDM's too.

        Kernels are uniform with variance 1 over the mean of fan_in and fan_out; a tenth of it for queries, keys and
        values, 1e-10 of it for the last layer of every block and of the network. Biases are zero, norms the identity.
        The class table has a row's share of a dense layer's law, times sqrt(classes) (EDM's scaled one-hot input).
        """
        *_, layer, name = path.split("/")
        shape = uniform.shape
        if name in ("scale", "bias"):
            return np.full(shape, 1.0 if name == "scale" else 0.0, np.float32)
        if name == "frequencies":
            return self.fourier_scale * normal()
        window = int(np.prod(shape[:-2]))
        fan_out = shape[-1] // 3 if layer == "qkv" else shape[-1]
        share = {"qkv": 0.1, "conv_2": 1e-10, "projection": 1e-10, "output": 1e-10}.get(layer, 1.0)
        share = float(shape[0]) if name == "table" else share
        return uniform * np.float32(np.sqrt(3 * share / (window * (shape[-2] + fan_out) / 2)))


class _Embedding(nn.Module):
    """MLP of the waves of c_noise plus the class's row; the row's place is EDM's (the original has no classes)."""

    config: SongUNet

    @nn.compact
    def __call__(self, c_noise: Float[Array, " b"], labels: Labels | None) -> Embedding:
        config = self.config
        if config.embedding == "fourier":
            frequencies = parameter(self, "frequencies", (config.width,))
            waves = fourier(c_noise, frequencies)
        else:
            waves = positional(c_noise, config.width)
        if labels is not None:
            table = parameter(self, "table", (config.classes or 0, waves.shape[1]))
            waves = waves + jnp.take(table, labels, axis=0).astype(waves.dtype)
        hidden = Dense(4 * config.width, name="dense_1")(waves)
        return Dense(4 * config.width, name="dense_2")(nn.silu(hidden))


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
"""NCSN++ at 32 pixels: the published CIFAR-10 consistency models and their EDM teacher. iCT's has fourier_scale=0.02,
and iCT-deep 8 blocks a level."""
DDPMPP = SongUNet(embedding="positional", resampling="plain", pyramid=False)
"""DDPM++ at 32 pixels: EDM's variance-preserving network, from which ECT starts. sCM's has modulation="normalised"."""
