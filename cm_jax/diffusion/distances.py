"""Distances d(x, y) between images, one value per image."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.errors import InputError
from cm_jax.types import Images, Params

Values = Float[Array, " b"]
Features = Float[Array, "b _ _ _"]


class Distance(abc.ABC):
    """d(x, y), one value per image."""

    @abc.abstractmethod
    def __call__(self, x: Images, y: Images) -> Values: ...

    def with_weights(self, params: Params | None) -> "Distance":
        """The same distance with these weights; itself if it has no weights."""
        del params
        return self

    def load_weights(self) -> Params | None:
        """The argument of `with_weights`, read from its file; None if it has no weights."""
        return None


@dataclasses.dataclass(frozen=True)
class Absolute(Distance):
    """Mean of |x - y| over pixels and channels; its gradient at x = y is 0, where that of jnp.abs is 1."""

    def __call__(self, x: Images, y: Images) -> Values:
        return ((x - y) * jax.lax.stop_gradient(jnp.sign(x - y))).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Squared(Distance):
    """Mean of (x - y)^2 over pixels and channels."""

    def __call__(self, x: Images, y: Images) -> Values:
        return jnp.square(x - y).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class PseudoHuber(Distance):
    """sqrt(||x - y||^2 + c^2) - c with c = scale sqrt(d) for images of d = h w c values (iCT, section 3.3).

    scale = 0 is the norm itself, as ECT uses for CIFAR-10; its gradient at x = y is zero.
    """

    scale: float = 0.00054

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise InputError(f"Expected a pseudo-Huber scale of at least 0, got {self.scale}.")

    def __call__(self, x: Images, y: Images) -> Values:
        """Computed as ||x - y||^2 / (sqrt(||x - y||^2 + c^2) + c), which avoids cancellation for similar images."""
        squared = jnp.square(x - y).sum((1, 2, 3))
        c = self.scale * (x[0].size) ** 0.5
        return squared / (jnp.sqrt(squared + c**2 + 1e-16) + c)


@dataclasses.dataclass(frozen=True, eq=False)
class Perceptual(Distance):
    """sum_k mean_pixels sum_c head_k[c] (u_k(x) - u_k(y))^2, u_k the unit-length features of layer k (LPIPS, eq. 1).

    `features` maps images in [-1, 1] to the outputs of its layers; its weights are included.
    """

    features: Callable[[Images], Sequence[Features]]
    heads: Sequence[Float[Array, " _"]]
    """One weight per channel and layer."""

    def __call__(self, x: Images, y: Images) -> Values:
        layers = zip(self.heads, self.features(x), self.features(y), strict=True)
        return sum((_layer_distance(*layer) for layer in layers), jnp.zeros(x.shape[0]))


def _layer_distance(head: Float[Array, " k"], x: Float[Array, "b m n k"], y: Float[Array, "b m n k"]) -> Values:
    return (head * jnp.square(_unit(x) - _unit(y))).sum(-1).mean((1, 2))


def _unit(features: Float[Array, "b m n k"]) -> Float[Array, "b m n k"]:
    """features / (||features|| + 1e-10) over channels; zero, with zero gradient, where all channels are zero."""
    squared = jnp.square(features).sum(-1, keepdims=True)
    length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
    return features / (length + 1e-10)


def resize_bilinear(x: Images, size: int) -> Float[Array, "b {size} {size} c"]:
    """`x` at size x size: bilinear with half-pixel centers and no antialiasing, as PyTorch resizes."""
    shape = (x.shape[0], size, size, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST)
