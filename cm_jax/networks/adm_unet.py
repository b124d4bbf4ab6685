"""The ADM U-Net of the published consistency models (Dhariwal and Nichol 2021; Song et al. 2023, appendix C).

`ADMUNet` is at once the description of a network and the network: a frozen, hashable dataclass whose `predict` is a
pure function of parameters and input. `plan()` lists its parts in order; the network, its parameter names and the
converters are all read off that one list.
"""

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from cm_jax.arrays import Images, Keys, Labels, Params, leaves, nested
from cm_jax.errors import InputError
from cm_jax.networks.attention import Implementation
from cm_jax.networks.blocks import (
    NORM_GROUPS,
    AttentionBlock,
    Convolution,
    Dense,
    Embedding,
    Features,
    GroupNorm,
    Modulation,
    Outputs,
    Resample,
    ResidualBlock,
    sinusoid,
)
from cm_jax.networks.precision import Precision


class Unit(NamedTuple):
    """One residual block, attention block or resampling convolution."""

    kind: Literal["residual", "attention", "convolution"]
    name: str
    """Its name inside its block."""
    channels_in: int
    channels_out: int
    resample: Resample | None = None


class Block(NamedTuple):
    """Units applied in turn. An encoder block's result is kept as a skip; a decoder block takes one in first."""

    name: str
    units: tuple[Unit, ...]


class Plan(NamedTuple):
    encoder: tuple[Block, ...]
    middle: Block
    decoder: tuple[Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.encoder, self.middle, *self.decoder)


@dataclasses.dataclass(frozen=True)
class ADMUNet:
    """F(params, c_in x, c_noise, labels): the ADM U-Net with the options that the original has.

    The defaults are the published ImageNet-64 network. Raises InputError for a shape that cannot be built.
    """

    image_size: int = 64
    """Height and width that it was trained on; the network itself takes any size that halves often enough."""
    image_channels: int = 3
    width: int = 192
    """Channels at multiplier 1; the embedding is four times as wide."""
    multipliers: tuple[float, ...] = (1, 2, 3, 4)
    """Channels of every level over `width`; the image is halved from each level to the next."""
    blocks_per_level: int = 3
    attention_factors: tuple[int, ...] = (2, 4, 8)
    """Where attention stands, as factors of down-sampling: at 64 pixels, 2 is attention at resolution 32."""
    head_width: int | None = 64
    """Channels of an attention head; None where `heads` fixes their number instead."""
    heads: int | None = None
    classes: int | None = 1000
    """Number of classes, or None for an unconditional network."""
    modulation: Modulation = "scale_shift"
    """How the embedding enters a block: scale and shift after its second norm, or added before it."""
    resampling: Literal["residual", "convolution"] = "residual"
    """Resample inside a residual block, or by a 3x3 convolution of its own."""
    dropout: float = 0.0
    precision: Precision = "float32"
    """Of the products inside the blocks; norms, softmax, embeddings and the output head are float32 always."""
    attention: Implementation = "auto"
    rematerialise: bool = False
    """Recompute every block in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_factors", tuple(self.attention_factors))
        problems = list(self._problems())
        if problems:
            raise InputError("This network cannot be built: " + "; ".join(problems) + ".")

    def _problems(self) -> Any:
        """Every way in which the fields contradict each other."""
        if (
            min(self.width, self.blocks_per_level, self.image_size, self.image_channels) < 1
            or not self.multipliers
            or min(self.multipliers) <= 0
        ):
            yield "width, multipliers, blocks_per_level, image_size and image_channels must all be positive"
            return
        if (self.head_width is None) == (self.heads is None):
            yield f"give head_width or heads, not both or neither (got {self.head_width} and {self.heads})"
        elif min(self.head_width or 1, self.heads or 1) < 1:
            yield f"head_width and heads must be positive (got {self.head_width} and {self.heads})"
        else:
            for level, channels in enumerate(self.level_channels):
                if channels % NORM_GROUPS:
                    yield f"level {level} has {channels} channels, not a multiple of the {NORM_GROUPS} norm groups"
                attends = 2**level in self.attention_factors or level == len(self.multipliers) - 1
                if attends and channels % (self.head_width or self.heads or 1):
                    heads = f"heads of width {self.head_width}" if self.head_width else f"{self.heads} heads"
                    yield f"level {level} has {channels} channels, which do not split into {heads}"
        if self.classes is not None and self.classes < 1:
            yield f"classes must be positive, or None for an unconditional network (got {self.classes})"
        if not 0 <= self.dropout < 1:
            yield f"dropout must lie in [0, 1) (got {self.dropout})"
        if self.image_size % self.reduction:
            yield (
                f"{len(self.multipliers)} levels halve the image {len(self.multipliers) - 1} times, so its size must "
                f"be a multiple of {self.reduction} (got {self.image_size})"
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(round(multiplier * self.width) for multiplier in self.multipliers)

    @property
    def reduction(self) -> int:
        """The factor by which the image is smaller on the deepest level."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that it was trained on."""
        return (self.image_size, self.image_size, self.image_channels)

    def heads_for(self, channels: int) -> int:
        """Number of attention heads in a block of so many channels."""
        return self.heads or channels // (self.head_width or channels)

    def plan(self) -> Plan:
        """The blocks in the order they are applied, after the stem and before the head."""
        deepest = len(self.multipliers) - 1
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

    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
    ) -> Images:
        """F(x, c_noise, labels), float32, in the shape of x. Without dropout keys, dropout is off.

        Raises InputError where labels are missing, or given to an unconditional network, or where x does not halve.
        """
        self.check_input(x.shape, labels is not None)
        return _ADMUNet(self).apply({"params": params}, x, c_noise, labels, dropout_keys)  # type: ignore[return-value]

    def inner_outputs(
        self, params: Params, x: Images, c_noise: Float[Array, " b"], labels: Labels | None = None
    ) -> dict[str, Array]:
        """What every unit puts out, by its path ("down_0_0/residual"), in the order of `plan`: to compare networks."""
        self.check_input(x.shape, labels is not None)
        _, state = _ADMUNet(self).apply(
            {"params": params}, x, c_noise, labels, None, capture_intermediates=True, mutable=["intermediates"]
        )
        found = dict(leaves(state["intermediates"]))  # type: ignore[index]
        paths = [f"{block.name}/{unit.name}" for block in self.plan().blocks for unit in block.units]
        return {path: found[f"{path}/__call__"][0] for path in paths}

    def check_input(self, shape: tuple[int, ...], labelled: bool) -> None:
        """Raise InputError unless images of this shape, with labels or without, suit the network."""
        if len(shape) != 4 or shape[-1] != self.image_channels:
            raise InputError(f"Images must be [batch, height, width, {self.image_channels}], got shape {list(shape)}.")
        if shape[1] % self.reduction or shape[2] % self.reduction:
            raise InputError(
                f"Images of {shape[1]}x{shape[2]} cannot be halved {len(self.multipliers) - 1} times: "
                f"height and width must be multiples of {self.reduction}."
            )
        if labelled and self.classes is None:
            raise InputError("Labels were given to an unconditional network: leave them out.")
        if not labelled and self.classes is not None:
            raise InputError(f"This network is class-conditional: give labels from 0 to {self.classes - 1}.")

    def shapes(self) -> Params:
        """The parameter tree as jax.ShapeDtypeStruct leaves, without computing anything."""
        size = self.reduction
        x = jax.ShapeDtypeStruct((1, size, size, self.image_channels), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        labels = None if self.classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
        plain = dataclasses.replace(self, attention="plain", rematerialise=False)
        return jax.eval_shape(_ADMUNet(plain).init, jax.random.key(0), x, time, labels)["params"]

    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()))

    def initialise(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters with PyTorch's default laws, as the original starts from.

        Kernels and biases are uniform in +-1/sqrt(fan_in), the class table is standard normal, norms are the identity,
        and the last layer of every block and of the network is zero, so that the fresh network puts out zero. All
        numbers come from two draws, because a draw per leaf takes the compiler half a minute.
        """
        shapes = dict(leaves(self.shapes()))
        key_uniform, key_table = jax.random.split(key)
        total = sum(leaf.size for leaf in shapes.values())
        stream = np.asarray(jax.random.uniform(key_uniform, (total,), minval=-1.0))
        params, start = {}, 0
        for path, leaf in shapes.items():
            *_, layer, name = path.split("/")
            uniform = stream[start : start + leaf.size].reshape(leaf.shape)
            start += leaf.size
            if "norm" in layer:
                value = np.full(leaf.shape, 1.0 if name == "scale" else 0.0, np.float32)
            elif name == "table":
                value = np.asarray(jax.random.normal(key_table, leaf.shape))
            elif layer in ("conv_2", "projection", "output"):
                value = np.zeros(leaf.shape, np.float32)
            else:
                kernel = shapes[path.rsplit("/", 1)[0] + "/kernel"]
                value = uniform / np.sqrt(np.prod(kernel.shape[:-1]), dtype=np.float32)
            params[path] = jnp.asarray(value)
        return nested(params)

    def prepare(self, params: Params) -> Params:
        """Parameters as repeated prediction wants them: those of the blocks' products in the compute precision.

        The network would cast them at every call. Half precision halves their memory.
        """
        products = ("stem", "conv_1", "conv_2", "skip", "qkv", "projection", "downsample", "upsample")

        def cast(path: str, leaf: Any) -> Array:
            return jnp.asarray(leaf, self.precision if path.split("/")[-2] in products else jnp.float32)

        return nested({path: cast(path, leaf) for path, leaf in leaves(params)})

    def at_precision(self, precision: Precision) -> "ADMUNet":
        """The same network with its products in another precision."""
        return dataclasses.replace(self, precision=precision)


class _ADMUNet(nn.Module):
    """The Flax side of `ADMUNet`."""

    config: ADMUNet

    @nn.compact
    def __call__(
        self, x: Images, c_noise: Float[Array, " b"], labels: Labels | None, dropout_keys: Keys | None = None
    ) -> Images:
        config = self.config
        plan = config.plan()
        embedding = _Embedding(config, name="embedding")(c_noise, labels)
        places = itertools.count()

        def apply(block: Block, h: Features) -> Outputs:
            return _Block(config, block, next(places), name=block.name)(h, embedding, dropout_keys)

        h = Convolution(config.level_channels[0], dtype=config.precision, name="stem")(x)
        skips = [h]
        for block in plan.encoder:
            h = apply(block, h)
            skips.append(h)
        h = apply(plan.middle, h)
        for block in plan.decoder:
            h = apply(block, jnp.concatenate([h, skips.pop()], axis=-1))
        return _Head(config.image_channels, name="head")(h.astype(jnp.float32))


class _Block(nn.Module):
    """The units of one block in turn; `place` numbers the blocks, and with the unit's place its dropout layer."""

    config: ADMUNet
    block: Block
    place: int

    @nn.compact
    def __call__(self, h: Features, embedding: Embedding, dropout_keys: Keys | None) -> Outputs:
        config = self.config
        dtype = config.precision
        recomputed = nn.remat if config.rematerialise else lambda module: module
        for index, unit in enumerate(self.block.units):
            match unit.kind:
                case "residual":
                    h = recomputed(ResidualBlock)(
                        features=unit.channels_out,
                        place=8 * self.place + index,
                        resample=unit.resample,
                        modulation=config.modulation,
                        dropout=config.dropout,
                        dtype=dtype,
                        name=unit.name,
                    )(h, embedding, dropout_keys)
                case "attention":
                    heads = config.heads_for(unit.channels_out)
                    h = recomputed(AttentionBlock)(heads, config.attention, dtype, name=unit.name)(h)
                case "convolution":
                    h = Convolution(unit.channels_out, unit.resample, dtype, name=unit.name)(h)
        return h


class _Embedding(nn.Module):
    """MLP of the sinusoid of c_noise, plus the class's row."""

    config: ADMUNet

    @nn.compact
    def __call__(self, c_noise: Float[Array, " b"], labels: Labels | None) -> Embedding:
        width = 4 * self.config.width
        hidden = Dense(width, name="dense_1")(sinusoid(c_noise, self.config.width))
        embedding = Dense(width, name="dense_2")(nn.silu(hidden))
        if labels is not None:
            table = self.param("table", nn.initializers.zeros, (self.config.classes, width))
            embedding = embedding + jnp.take(table, labels, axis=0).astype(embedding.dtype)
        return embedding


class _Head(nn.Module):
    """Norm, SiLU, convolution to image channels."""

    channels: int

    @nn.compact
    def __call__(self, h: Features) -> Outputs:
        return Convolution(self.channels, name="output")(nn.silu(GroupNorm(name="norm")(h)))
