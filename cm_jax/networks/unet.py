"""U-Nets as pure functions of parameters and input: prediction, parameter shapes, initialization; the Flax module."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from cm_jax.errors import InputError
from cm_jax.networks.layers import (
    UNCERTAINTY_FEATURES,
    AttentionBlock,
    Convolution,
    Dense,
    Embedding,
    Features,
    GroupNorm,
    Joined,
    Outputs,
    ResidualBlock,
    SmoothedConvolution,
    parameter,
    sinusoid,
)
from cm_jax.networks.operations import multiply
from cm_jax.networks.unet_config import Block, UNetConfig
from cm_jax.types import Images, Keys, Labels, Params, Precision, leaves, nested

_COMPUTE_PRECISION_LAYERS = frozenset(
    ("stem", "conv_1", "conv_2", "skip", "qkv", "projection", "downsample", "upsample", "pyramid")
)
"""Layers that compute in `precision`; all others compute in float32."""
_GUIDANCE_FEATURES = 128
"""Width of the sinusoids of guidance strengths."""
Pyramid = Float[Array, "b h3 w3 c3"]
"""Input pyramid: the image, then the output of the last downsampling block."""


@dataclasses.dataclass(frozen=True)
class UNet(UNetConfig):
    """A U-Net without its parameters. Raises InputError for settings that cannot be built."""

    @abc.abstractmethod
    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> Any:
        """Initial value of one parameter, from random numbers of its shape.

        uniform: uniform in [-1, 1]. normal: a function that returns standard normal numbers.
        """

    def module(self) -> nn.Module:
        """The Flax module that applies the network."""
        return UNetModule(self)

    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
        augmentation: Float[Array, "b a"] | None = None,
        guidance: Float[Array, " b"] | None = None,
    ) -> Images:
        """F(x, c_noise, labels): float32, in the shape of x.

        labels: classes, or `classes` for none. dropout_keys: one key per image; None turns dropout off. length: second
        time input of a network with interval_embedding; None means c_noise. augmentation: the parameters of the
        augmentation of each image, for a network with augment_dim. guidance: strengths, for a network with
        guidance_embedding; None means 1. Raises InputError for labels that are missing or given to an unconditional
        network, and for images whose size or channels do not fit.
        """
        self.check_input(x.shape, labels is not None)
        if length is not None and not self.interval_embedding:
            raise InputError("An interval length was given to a network without interval_embedding=True.")
        if guidance is not None and not self.guidance_embedding:
            raise InputError("A guidance strength was given to a network without guidance_embedding=True.")
        inputs = (x, c_noise, labels, dropout_keys, length, augmentation, guidance)
        return self.module().apply({"params": params}, *inputs)  # type: ignore[return-value]

    def log_variance(self, params: Params, c_noise: Float[Array, " b"]) -> Float[Array, " b"]:
        """The uncertainty u(sigma) of a network with `uncertainty`, for the loss e^-u (D - x)^2 + u (EDM2, eq. 21)."""
        head = params["uncertainty"]
        return (sinusoid(c_noise, UNCERTAINTY_FEATURES) @ head["kernel"] + head["bias"])[:, 0]

    def inner_outputs(
        self, params: Params, x: Images, c_noise: Float[Array, " b"], labels: Labels | None = None
    ) -> dict[str, Array]:
        """Output of every unit by path ("down_0_0/residual"), in the order of `plan`, to compare networks."""
        self.check_input(x.shape, labels is not None)
        _, state = self.module().apply(
            {"params": params}, x, c_noise, labels, None, capture_intermediates=True, mutable=["intermediates"]
        )
        found = dict(leaves(state["intermediates"]))  # type: ignore[index]
        paths = [f"{block.name}/{unit.name}" for block in self.plan().blocks for unit in block.units]
        return {path: found[f"{path}/__call__"][0] for path in paths}

    def check_input(self, shape: tuple[int, ...], labeled: bool) -> None:
        """Raise InputError unless images of this shape, with or without labels, suit the network."""
        if len(shape) != 4 or shape[-1] != self.image_channels:
            expected = f"[batch, height, width, {self.image_channels}]"
            raise InputError(f"Expected images of shape {expected}, got {list(shape)}.")
        if shape[1] % self.reduction or shape[2] % self.reduction:
            size = f"{shape[1]}x{shape[2]}"
            raise InputError(f"Expected image height and width to be multiples of {self.reduction}, got {size}.")
        if labeled and self.classes is None:
            raise InputError("Labels were given to an unconditional network: leave them out.")
        if not labeled and self.classes is not None:
            raise InputError(f"This network is class-conditional: give labels from 0 to {self.classes - 1}.")

    def shapes(self) -> Params:
        """The parameter tree with jax.ShapeDtypeStruct leaves; computes nothing."""
        plain = dataclasses.replace(self, attention="plain", rematerialize=False, precision="float32", dropout=0.0)
        return jax.tree.map(lambda leaf: leaf, _shapes(plain))  # a copy, which the caller may change

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()))

    def initialize(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters, as `initial` defines them.

        One random array serves all parameters, because compiling a random number generator per parameter takes half a
        minute.
        """
        shapes = dict(leaves(self.shapes()))
        key_uniform, key_normal = jax.random.split(key)
        ends = np.cumsum([leaf.size for leaf in shapes.values()])
        stream = np.asarray(jax.random.uniform(key_uniform, (int(ends[-1]),), np.float32, minval=-1.0))
        params = {}
        for (path, leaf), part in zip(shapes.items(), np.split(stream, ends[:-1]), strict=True):
            normal = functools.partial(jax.random.normal, key_normal, leaf.shape, np.float32)
            zero = path.startswith("guidance/")  # a student starts as its teacher
            value = np.zeros(leaf.shape) if zero else self.initial(path, shapes, part.reshape(leaf.shape), normal)
            params[path] = jnp.asarray(value, jnp.float32)
        return nested(params)

    def prepare(self, params: Params) -> Params:
        """Parameters cast for repeated prediction: kernels in the compute precision, all others in float32.

        Without it the network casts them in every call. NumPy arrays are cast on the host, because a cast on a device
        compiles a program for every shape.
        """

        def cast(path: str, leaf: Any) -> Array:
            compute = path.split("/")[-2] in _COMPUTE_PRECISION_LAYERS
            dtype = jnp.dtype(self.precision if compute else jnp.float32)
            return jnp.asarray(leaf.astype(dtype, copy=False) if isinstance(leaf, np.ndarray) else leaf, dtype)

        return nested({path: cast(path, leaf) for path, leaf in leaves(params)})

    def constrain(self, params: Params) -> Params:
        """Parameters as they must be before every training step; by default unchanged."""
        return params

    def at_precision(self, precision: Precision) -> "UNet":
        """The same network with another compute precision, which cuDNN may not support: cudnn becomes auto."""
        attention = "auto" if self.attention == "cudnn" else self.attention
        return dataclasses.replace(self, precision=precision, attention=attention)


@functools.lru_cache(maxsize=64)
def _shapes(network: UNet) -> Params:
    """The parameter tree of a network. Tracing takes up to a second, and loading or training asks several times."""
    size = network.reduction
    x = jax.ShapeDtypeStruct((1, size, size, network.image_channels), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    labels = None if network.classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    initialized = functools.partial(network.module().apply, {}, mutable=["params"])
    return jax.eval_shape(initialized, x, time, labels)[1]["params"]  # type: ignore[index]


class GuidanceEmbedding(nn.Module):
    """A linear layer, zero at first, on sinusoids of 100 (w - 1) for guidance strengths w; None means w = 1."""

    features: int

    @nn.compact
    def __call__(self, guidance: Float[Array, " b"] | None, time: Float[Array, " b"]) -> Embedding:
        w = jnp.ones_like(time) if guidance is None else guidance
        weight = parameter(self, "weight", (_GUIDANCE_FEATURES, self.features))
        return multiply(sinusoid(100 * (w - 1), _GUIDANCE_FEATURES), weight)


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
        augmentation: Float[Array, "b a"] | None = None,
        guidance: Float[Array, " b"] | None = None,
    ) -> Images:
        config, plan = self.config, self.config.plan()
        embedding = config.embedder()(c_noise, labels, augmentation)
        if config.interval_embedding:
            embedding += config.embedder("length")(c_noise if length is None else length, None, None)
        if config.guidance_embedding:
            embedding += GuidanceEmbedding(embedding.shape[1], name="guidance")(guidance, c_noise)
        if config.uncertainty:
            Dense(1, name="uncertainty")(sinusoid(c_noise, UNCERTAINTY_FEATURES))
        numbers = itertools.count()

        def apply(block: Block, h: Features, pyramid: Pyramid, skip: Joined | None = None) -> Outputs:
            return _Block(config, block, next(numbers), name=block.name)(h, pyramid, embedding, dropout_keys, skip)

        pyramid = x
        h = Convolution(config.stem_channels, dtype=config.precision, name="stem")(x)
        skips = [h]
        for block in plan.encoder:
            h = apply(block, h, pyramid)
            pyramid = h if block.units[-1].kind == "pyramid" else pyramid
            skips.append(h)
        h = apply(plan.middle, h, pyramid)
        for block in plan.decoder:
            h = apply(block, h, pyramid, skips.pop())
        return _Head(config, name="head")(h.astype(jnp.float32))[..., : config.image_channels]


class _Block(nn.Module):
    """The units of one block in turn. Block number and unit index identify a dropout layer.

    The first unit of a decoder block, a residual block, takes the features of `skip` as well.
    """

    config: UNetConfig
    block: Block
    number: int

    @nn.compact
    def __call__(
        self,
        h: Features,
        pyramid: Pyramid,
        embedding: Embedding,
        dropout_keys: Keys | None,
        skip: Joined | None = None,
    ) -> Outputs:
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
                    )(h, embedding, dropout_keys, None if index else skip)
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
        h = GroupNorm(self.config.style, name="norm")(h, silu=True)
        return Convolution(self.config.head_channels, name="output")(h)
