"""U-Nets as pure functions of parameters and input: prediction, parameter shapes, initialization."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from cm_jax.errors import InputError
from cm_jax.networks.unet_config import UNetConfig
from cm_jax.networks.unet_module import UNetModule
from cm_jax.types import Images, Keys, Labels, Params, Precision, leaves, nested

_COMPUTE_PRECISION_LAYERS = frozenset(
    ("stem", "conv_1", "conv_2", "skip", "qkv", "projection", "downsample", "upsample", "pyramid")
)
"""Layers that compute in `precision`; all others compute in float32."""


@dataclasses.dataclass(frozen=True)
class UNet(UNetConfig):
    """A U-Net without its parameters. Raises InputError for settings that cannot be built."""

    @abc.abstractmethod
    def initial(self, path: str, shapes: Mapping[str, Any], uniform: np.ndarray, normal: Callable) -> np.ndarray:
        """Initial value of one parameter, from random numbers of its shape.

        uniform: uniform in [-1, 1]. normal: a function that returns standard normal numbers.
        """

    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
    ) -> Images:
        """F(x, c_noise, labels): float32, in the shape of x.

        dropout_keys: one key per image; None turns dropout off. length: second time input of a network with
        interval_embedding; None means c_noise. Raises InputError for labels that are missing or given to an
        unconditional network, and for images whose size or channels do not fit.
        """
        self.check_input(x.shape, labels is not None)
        if length is not None and not self.interval_embedding:
            raise InputError("An interval length was given to a network without interval_embedding=True.")
        inputs = (x, c_noise, labels, dropout_keys, length)
        return UNetModule(self).apply({"params": params}, *inputs)  # type: ignore[return-value]

    def inner_outputs(
        self, params: Params, x: Images, c_noise: Float[Array, " b"], labels: Labels | None = None
    ) -> dict[str, Array]:
        """Output of every unit by path ("down_0_0/residual"), in the order of `plan`, to compare networks."""
        self.check_input(x.shape, labels is not None)
        _, state = UNetModule(self).apply(
            {"params": params}, x, c_noise, labels, None, capture_intermediates=True, mutable=["intermediates"]
        )
        found = dict(leaves(state["intermediates"]))  # type: ignore[index]
        paths = [f"{block.name}/{unit.name}" for block in self.plan().blocks for unit in block.units]
        return {path: found[f"{path}/__call__"][0] for path in paths}

    def check_input(self, shape: tuple[int, ...], labeled: bool) -> None:
        """Raise InputError unless images of this shape, with or without labels, suit the network."""
        if len(shape) != 4 or shape[-1] != self.image_channels:
            raise InputError(
                f"Expected images of shape [batch, height, width, {self.image_channels}], got {list(shape)}."
            )
        if shape[1] % self.reduction or shape[2] % self.reduction:
            raise InputError(
                f"Expected image height and width to be multiples of {self.reduction}, got {shape[1]}x{shape[2]}."
            )
        if labeled and self.classes is None:
            raise InputError("Labels were given to an unconditional network: leave them out.")
        if not labeled and self.classes is not None:
            raise InputError(f"This network is class-conditional: give labels from 0 to {self.classes - 1}.")

    def shapes(self) -> Params:
        """The parameter tree with jax.ShapeDtypeStruct leaves; computes nothing."""
        size = self.reduction
        x = jax.ShapeDtypeStruct((1, size, size, self.image_channels), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        labels = None if self.classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
        plain = dataclasses.replace(self, attention="plain", rematerialize=False)
        initialized = functools.partial(UNetModule(plain).apply, {}, mutable=["params"])
        return jax.eval_shape(initialized, x, time, labels)[1]["params"]  # type: ignore[index]

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
        """Parameters cast for repeated prediction: kernels in the compute precision, all others in float32.

        Without it the network casts them in every call. NumPy arrays are cast on the host, because a cast on a device
        compiles a program for every shape.
        """

        def cast(path: str, leaf: Any) -> Array:
            compute = path.split("/")[-2] in _COMPUTE_PRECISION_LAYERS
            dtype = jnp.dtype(self.precision if compute else jnp.float32)
            return jnp.asarray(leaf.astype(dtype, copy=False) if isinstance(leaf, np.ndarray) else leaf, dtype)

        return nested({path: cast(path, leaf) for path, leaf in leaves(params)})

    def at_precision(self, precision: Precision) -> "UNet":
        """The same network with another compute precision."""
        return dataclasses.replace(self, precision=precision)
