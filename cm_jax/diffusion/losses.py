"""The terms of a loss w(t, r) d(x, y): weightings w of pairs of noise levels, and distances d between images."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.errors import InputError
from cm_jax.types import Images, Params, Sigmas

Values = Float[Array, " b"]
Features = Float[Array, "b m n k"]


class Weighting(abc.ABC):
    """w(t, r) for t > r, one weight per image, for data of standard deviation sigma_data. A denoiser's r is 0."""

    @abc.abstractmethod
    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas: ...


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """1, as all published consistency models use."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class SNR(Weighting):
    """snr = 1 / t^2."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return t**-2


@dataclasses.dataclass(frozen=True)
class SNRPlusOne(Weighting):
    """snr + 1."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return t**-2 + 1


@dataclasses.dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(snr, 1) (progressive distillation)."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return jnp.maximum(t**-2, 1)


@dataclasses.dataclass(frozen=True)
class Karras(Weighting):
    """snr + 1 / sigma_data^2 = 1 / c_out(t)^2 of EDMPreconditioning (EDM, table 1; ECT for ImageNet-64).

    Errors of the network's raw output count equally at all noise levels.
    """

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return t**-2 + sigma_data**-2


@dataclasses.dataclass(frozen=True)
class InverseGap(Weighting):
    """1 / (t - r) (iCT, section 3.1; ECT for CIFAR-10)."""

    def __call__(self, t: Sigmas, r: Sigmas, sigma_data: float = 0.5) -> Sigmas:
        return 1 / (t - r)


AnyWeighting = Uniform | SNR | SNRPlusOne | TruncatedSNR | Karras | InverseGap | Weighting


class Distance(abc.ABC):
    """d(x, y), one value per image."""

    @abc.abstractmethod
    def __call__(self, x: Images, y: Images) -> Values: ...

    def with_weights(self, params: Params | None) -> "Distance":
        """The same distance with these weights; itself if it has no weights."""
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
    """c / sqrt(d); 0: the norm."""

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
        squares = (head * jnp.square(_unit(of_x) - _unit(of_y)) for head, of_x, of_y in layers)
        return sum((square.sum(-1).mean((1, 2)) for square in squares), jnp.zeros(x.shape[0]))

    def embed(self, x: Images) -> Float[Array, "b _"]:
        """Vectors whose squared Euclidean distance is this distance. Heads must not be negative."""
        scaled = (
            _unit(of_x) * jnp.sqrt(head / of_x[0, ..., 0].size)
            for head, of_x in zip(self.heads, self.features(x), strict=True)
        )
        return jnp.concatenate([each.reshape(len(x), -1) for each in scaled], axis=1)


def _unit(features: Features) -> Features:
    """features / (||features|| + 1e-10) over channels; zero, with zero gradient, where all channels are zero."""
    squared = jnp.square(features).sum(-1, keepdims=True)
    length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
    return features / (length + 1e-10)


def resize_bilinear(x: Images, size: int) -> Float[Array, "b {size} {size} c"]:
    """`x` at size x size: bilinear with half-pixel centers and no antialiasing, as PyTorch resizes."""
    shape = (x.shape[0], size, size, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST)
