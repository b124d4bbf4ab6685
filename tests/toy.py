"""A network that compiles quickly, with all features that training needs: classes, dropout, large parameters."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import cm_jax
from cm_jax.networks import BaseNetwork
from cm_jax.networks.layers import class_embedding
from cm_jax.types import ImageSize, height_width


@cm_jax.register
@dataclasses.dataclass(frozen=True)
class ToyNetwork(BaseNetwork):
    """An MLP with one hidden layer over all pixels."""

    image_size: ImageSize = 4
    image_channels: int = 3
    classes: int | None = 3
    width: int = 128
    dropout: float = 0.2
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = "plain"
    interval_embedding: bool = False
    guidance_embedding: bool = False

    @property
    def image_shape(self):
        return (*height_width(self.image_size), self.image_channels)

    def shapes(self):
        pixels = int(np.prod(self.image_shape))
        sizes = {"in": (pixels, self.width), "time": (self.width,), "out": (self.width, pixels), "bias": (pixels,)}
        if self.classes:
            sizes["table"] = (self.classes, self.width)
        return {"mlp": {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}}

    def initialize(self, key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.1), jnp.float32), self.shapes())

    def predict(self, params, x, c_noise, labels=None, dropout_keys=None, length=None):
        own = params["mlp"]
        hidden = x.reshape(x.shape[0], -1) @ own["in"] + jnp.tanh(c_noise)[:, None] * own["time"]
        if labels is not None:
            hidden = hidden + class_embedding(own["table"], labels)
        hidden = jax.nn.silu(hidden)
        if dropout_keys is not None and self.dropout:
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, hidden.shape[1:]))(dropout_keys)
            hidden = jnp.where(keep, hidden / (1 - self.dropout), 0)
        return (hidden @ own["out"] + own["bias"]).reshape(x.shape)
