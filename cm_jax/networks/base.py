"""Defaults for networks of your own."""

import abc
import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from cm_jax.errors import InputError
from cm_jax.types import Images, Keys, Labels, Params, Precision


class BaseNetwork(abc.ABC):
    """A `cm_jax.types.Network` but for `image_shape`, `initialize` and `predict`, which subclasses define.

    Subclasses are frozen dataclasses: their fields are settings, and parameters are arguments.
    """

    image_shape: tuple[int, int, int]
    """(height, width, channels) of the images."""
    classes: int | None = None
    """Number of classes; label `classes` stands for no label. None for an unconditional network."""
    precision: Precision = "float32"
    attention: str = "plain"
    interval_embedding: bool = False
    """Whether `predict` uses its argument `length` (MeanFlow)."""
    guidance_embedding: bool = False
    """Whether `predict` has an argument `guidance`."""

    @abc.abstractmethod
    def initialize(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters: a nested dictionary of arrays, with strings as keys."""

    @abc.abstractmethod
    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
    ) -> Images:
        """F(x, c_noise, labels) in the shape of x. dropout_keys: one key per image; None turns dropout off."""

    def shapes(self) -> Params:
        """The parameter tree with jax.ShapeDtypeStruct leaves."""
        return jax.eval_shape(self.initialize, jax.random.key(0))

    def check_input(self, shape: tuple[int, ...], labeled: bool) -> None:
        """Raise InputError unless images of this shape, with or without labels, suit the network."""
        if len(shape) != 4 or tuple(shape[1:]) != tuple(self.image_shape):
            raise InputError(f"Expected images of shape {['batch', *self.image_shape]}, got {list(shape)}.")
        if labeled != (self.classes is not None):
            raise InputError(
                "Labels were given to an unconditional network: leave them out."
                if labeled
                else f"This network is class-conditional: give labels from 0 to {(self.classes or 1) - 1}."
            )

    def prepare(self, params: Params) -> Params:
        """Parameters converted for repeated prediction."""
        return jax.tree.map(jax.numpy.asarray, params)

    def constrain(self, params: Params) -> Params:
        """Parameters as they must be before every training step."""
        return params

    def at_precision(self, precision: Precision) -> Any:
        """The same network with another value of its field `precision`, if it has one."""
        own: Any = self
        fields = (field.name for field in dataclasses.fields(own))
        return dataclasses.replace(own, precision=precision) if "precision" in fields else self
