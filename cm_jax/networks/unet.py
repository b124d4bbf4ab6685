"""What the U-Nets share: a list of their parts, everything that can be read off it, and the walk along it."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from cm_jax.errors import InputError
from cm_jax.networks.attention import Implementation
from cm_jax.networks.blocks import (
    AttentionBlock,
    Convolution,
    Embedding,
    Features,
    GroupNorm,
    Modulation,
    Outputs,
    Resample,
    ResidualBlock,
    SmoothedConvolution,
    Style,
)
from cm_jax.types import Images, Keys, Labels, Params, Precision, leaves, nested

Pyramid = Float[Array, "b h3 w3 c3"]
"""The pyramid of inputs: the image itself, then what the last step down made of it and the features."""


class Unit(NamedTuple):
    """One residual block, attention block or resampling convolution, or a step down the pyramid of inputs."""

    kind: Literal["residual", "attention", "convolution", "pyramid"]
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


class UNet(abc.ABC):
    """A frozen dataclass of settings, whose `plan` lists its parts and whose `predict` is a pure function."""

    image_size: int
    image_channels: int
    width: int
    channel_mult: tuple[float, ...]
    classes: int | None
    interval_embedding: bool
    modulation: Modulation
    dropout: float
    dropout_size: int | None
    precision: Precision
    attention: Implementation
    rematerialize: bool

    @property
    @abc.abstractmethod
    def style(self) -> Style:
        """What its blocks have of their family."""

    @property
    @abc.abstractmethod
    def stem_channels(self) -> int:
        """Channels of the first convolution."""

    @abc.abstractmethod
    def heads_for(self, channels: int) -> int:
        """Number of attention heads in a block of so many channels."""

    @abc.abstractmethod
    def plan(self) -> Plan:
        """The blocks in the order they are applied, after the stem and before the head."""

    @abc.abstractmethod
    def embedder(self, name: str = "embedding") -> nn.Module:
        """The module that makes one embedding of c_noise and labels."""

    @abc.abstractmethod
    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> np.ndarray:
        """A fresh leaf, from numbers of its shape: uniform in [-1, 1], or, on demand, standard normal."""

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(round(multiplier * self.width) for multiplier in self.channel_mult)

    @property
    def reduction(self) -> int:
        """The factor by which the image is smaller on the deepest level."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that it was trained on."""
        return (self.image_size, self.image_size, self.image_channels)

    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
    ) -> Images:
        """F(x, c_noise, labels), float32, in the shape of x. Without dropout keys, dropout is off.

        `length`: what a network with an interval clock is told beside c_noise; None is c_noise again, the whole way to
        the data. Raises InputError where labels are missing, or given to an unconditional network, or where x does not
        halve.
        """
        self.check_input(x.shape, labels is not None)
        if length is not None and not self.interval_embedding:
            raise InputError(
                "This network has one clock, and was told an interval's length: set interval_embedding=True."
            )
        inputs = (x, c_noise, labels, dropout_keys, length)
        return _UNet(self).apply({"params": params}, *inputs)  # type: ignore[return-value]

    def inner_outputs(
        self, params: Params, x: Images, c_noise: Float[Array, " b"], labels: Labels | None = None
    ) -> dict[str, Array]:
        """What every unit puts out, by its path ("down_0_0/residual"), in the order of `plan`: to compare networks."""
        self.check_input(x.shape, labels is not None)
        _, state = _UNet(self).apply(
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
                f"Images of {shape[1]}x{shape[2]} cannot be halved {len(self.channel_mult) - 1} times: "
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
        plain: UNet = dataclasses.replace(self, attention="plain", rematerialize=False)  # type: ignore[type-var]
        made = functools.partial(_UNet(plain).apply, {}, mutable=["params"])
        return jax.eval_shape(made, x, time, labels)[1]["params"]  # type: ignore[index]

    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()))

    def initialize(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters by the laws of `initial`.

        All numbers come from two draws, because a draw per leaf takes the compiler half a minute.
        """
        shapes = dict(leaves(self.shapes()))
        key_uniform, key_normal = jax.random.split(key)
        total = sum(leaf.size for leaf in shapes.values())
        stream = np.asarray(jax.random.uniform(key_uniform, (total,), minval=-1.0))
        params, start = {}, 0
        for path, leaf in shapes.items():
            uniform = stream[start : start + leaf.size].reshape(leaf.shape)
            start += leaf.size

            def normal(shape: tuple[int, ...] = leaf.shape) -> np.ndarray:
                return np.asarray(jax.random.normal(key_normal, shape))

            params[path] = jnp.asarray(self.initial(path, shapes, uniform, normal), jnp.float32)
        return nested(params)

    def prepare(self, params: Params) -> Params:
        """Parameters as repeated prediction wants them: those of the blocks' products in the compute precision.

        The network would cast them at every call. Half precision halves their memory. What lies on the host is cast
        there, because on a device there would be a program to compile for every shape.
        """
        products = ("stem", "conv_1", "conv_2", "skip", "qkv", "projection", "downsample", "upsample", "pyramid")

        def cast(path: str, leaf: Any) -> Array:
            dtype = jnp.dtype(self.precision if path.split("/")[-2] in products else jnp.float32)
            return jnp.asarray(leaf.astype(dtype, copy=False) if isinstance(leaf, np.ndarray) else leaf, dtype)

        return nested({path: cast(path, leaf) for path, leaf in leaves(params)})

    def at_precision(self, precision: Precision) -> "UNet":
        """The same network with its products in another precision."""
        return dataclasses.replace(self, precision=precision)  # type: ignore[type-var]


class _UNet(nn.Module):
    """The Flax side of a `UNet`: the walk along its plan."""

    config: UNet

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
        places = itertools.count()

        def apply(block: Block, h: Features, pyramid: Pyramid) -> Outputs:
            return _Block(config, block, next(places), name=block.name)(h, pyramid, embedding, dropout_keys)

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
    """The units of one block in turn; `place` numbers the blocks, and with the unit's place its dropout layer."""

    config: UNet
    block: Block
    place: int

    @nn.compact
    def __call__(self, h: Features, pyramid: Pyramid, embedding: Embedding, dropout_keys: Keys | None) -> Outputs:
        config = self.config
        dtype, style = config.precision, config.style
        recomputed = nn.remat if config.rematerialize else lambda module: module
        for index, unit in enumerate(self.block.units):
            match unit.kind:
                case "residual":
                    h = recomputed(ResidualBlock)(
                        features=unit.channels_out,
                        place=8 * self.place + index,
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
                    h = recomputed(AttentionBlock)(heads, config.attention, dtype, style, name=unit.name)(h)
                case "convolution":
                    h = Convolution(unit.channels_out, unit.resample, dtype, name=unit.name)(h)
                case "pyramid":
                    smaller = SmoothedConvolution(unit.channels_out, style.resampling, dtype, name=unit.name)(pyramid)
                    h = (smaller + h) * style.residual_scale
        return h


class _Head(nn.Module):
    """Norm, SiLU, convolution to image channels."""

    config: UNet

    @nn.compact
    def __call__(self, h: Features) -> Outputs:
        norm = GroupNorm(self.config.style, name="norm")
        return Convolution(self.config.image_channels, name="output")(norm(h, silu=True))
