"""A network that compiles quickly, with all features that training needs: classes, dropout, large parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax.networks.layers import class_embedding


@dataclasses.dataclass(frozen=True)
class ToyNetwork:
    """An MLP with one hidden layer over all pixels."""

    image_size: int = 4
    classes: int | None = 3
    width: int = 128
    dropout: float = 0.2
    precision: str = "float32"
    attention: str = "plain"
    interval_embedding: bool = False
    guidance_embedding: bool = False

    @property
    def image_shape(self):
        return (self.image_size, self.image_size, 3)

    def check_input(self, shape, labeled):
        assert shape[1:] == self.image_shape
        assert labeled == (self.classes is not None)

    def shapes(self):
        pixels = int(np.prod(self.image_shape))
        sizes = {"in": (pixels, self.width), "time": (self.width,), "out": (self.width, pixels), "bias": (pixels,)}
        if self.classes:
            sizes["table"] = (self.classes, self.width)
        return {"mlp": {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}}

    def initialize(self, key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.1), jnp.float32), self.shapes())

    def prepare(self, params):
        return params

    def constrain(self, params):
        return params

    def at_precision(self, precision):
        return dataclasses.replace(self, precision=precision)

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
