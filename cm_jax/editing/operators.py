"""What is known of an image: orthogonal projections P of image space (P P = P, and P x is orthogonal to x - P x).

The paper writes them as an invertible A and a binary mask Omega of what is unknown, P = A^-1 (1 - Omega) A
(CM, algorithm 4). Where one direction v of every pixel or patch is known, P x = v (v . x), and A need not be built.
An operator is a tree for JAX: its arrays have one entry per image, and the rest is compiled in.
"""

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from cm_jax.errors import InputError, check_int
from cm_jax.types import Images

_LUMA = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in the brightness that one sees, as the original has them."""
_STROKES, _STROKES_SIZE = (5.38, 2.24), 256
"""Levels of the paper for strokes, and the size of its images (CM, appendix D)."""


def stroke_sigmas(image_size: int) -> tuple[float, ...]:
    """The paper's levels for strokes, 5.38 and 2.24 at 256 pixels, in proportion to the size.

    What noise hides is what it outweighs in the mean over an area, which has fewer pixels in a smaller image.
    """
    return tuple(sigma * image_size / _STROKES_SIZE for sigma in _STROKES)


class Operator(abc.ABC):
    """P, and where an edit begins."""

    @abc.abstractmethod
    def project(self, x: Images) -> Images:
        """P x: of x what is known."""

    def replace(self, known: Images, x: Images) -> Images:
        """P known + (x - P x) = x + P (known - x): x, with what is known put back."""
        return x + self.project(known - x)

    def start(self, images: Images, noise: Images) -> Images:
        """x at the first level: what is known, under the noise of that level."""
        return self.project(images) + noise

    def shown(self, images: Images) -> Images:
        """What is known, as a picture to look at."""
        return self.project(images)

    def default_sigmas(self, image_size: int) -> tuple[float, ...] | None:
        """Levels where none are asked for; None for steps from sigma_max. Raises InputError where they must be told."""
        del image_size
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise InputError unless it can be applied to images of this shape."""
        del shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Luma(Operator):
    """Brightness is known and colour is not: v is (0.2989, 0.587, 0.114) of unit length, along the channels.

    A grey picture is known in full by it: P x of a picture and of its grey version are the same.
    """

    def project(self, x: Images) -> Images:
        v = jnp.asarray(np.array(_LUMA) / np.linalg.norm(_LUMA), x.dtype)
        return v * (v * x).sum(-1, keepdims=True)

    def shown(self, images: Images) -> Images:
        """The grey picture: P x itself is a green one."""
        gray = (jnp.asarray(_LUMA, images.dtype) * images).sum(-1, keepdims=True)
        return jnp.broadcast_to(gray, images.shape)

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[-1] != 3:
            raise InputError(f"Only images of red, green and blue can be coloured; these have {shape[-1]} channel(s).")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchMean(Operator):
    """The mean of every patch is known, channel by channel: v is constant on patches of size x size pixels.

    Raises InputError unless the size is a whole number and divides height and width.
    """

    size: int = dataclasses.field(default=8, metadata={"static": True})
    """Pixels of a patch's side."""

    def __post_init__(self) -> None:
        check_int("The size of a patch", self.size, 1, 2**16)

    def project(self, x: Images) -> Images:
        b, h, w, c = x.shape
        patches = x.reshape(b, h // self.size, self.size, w // self.size, self.size, c)
        return jnp.broadcast_to(patches.mean((2, 4), keepdims=True), patches.shape).reshape(x.shape)

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[1] % self.size or shape[2] % self.size:
            fitting = [size for size in range(2, min(shape[1:3]) + 1) if not (shape[1] % size or shape[2] % size)]
            raise InputError(
                f"Patches of {self.size} pixels do not fill images of {shape[2]} x {shape[1]}: "
                f"choose one of {', '.join(map(str, fitting))}."
            )


@dataclasses.dataclass(frozen=True)
class Mask(Operator):
    """Some pixels are known and others are not. Raises InputError unless `known` is as it is described."""

    known: Bool[Array | np.ndarray, "b h w 1"]
    """Whether a pixel is known: one mask per image."""

    def __post_init__(self) -> None:
        if self.known.ndim != 4 or self.known.shape[-1] != 1 or self.known.dtype != bool:
            raise InputError(
                f"A mask must be bool [b, h, w, 1], True where a pixel is known; "
                f"got {self.known.dtype} {list(self.known.shape)}."
            )

    def project(self, x: Images) -> Images:
        return jnp.where(self.known, x, 0)

    def replace(self, known: Images, x: Images) -> Images:
        """Known pixels themselves, to the bit."""
        return jnp.where(self.known, known, x)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.known.shape[:3] != shape[:3]:
            raise InputError(f"The mask is {list(self.known.shape)}; wanted for these images: {[*shape[:3], 1]}.")


def _as_tree(mask: Mask) -> tuple[tuple[Array | np.ndarray], None]:
    return (mask.known,), None


def _from_tree(_: None, leaves: Iterable[Any]) -> Mask:
    """Not through __init__, whose checks are for users: JAX also builds trees of things that are no arrays."""
    mask = object.__new__(Mask)
    object.__setattr__(mask, "known", *leaves)
    return mask


jax.tree_util.register_pytree_node(Mask, _as_tree, _from_tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strokes(Operator):
    """Nothing is known for sure (P = 0): the image is where one begins, below noise that hides its details (SDEdit)."""

    def project(self, x: Images) -> Images:
        return jnp.zeros_like(x)

    def start(self, images: Images, noise: Images) -> Images:
        return images + noise

    def shown(self, images: Images) -> Images:
        return images

    def default_sigmas(self, image_size: int) -> tuple[float, ...]:
        return stroke_sigmas(image_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy(Operator):
    """The image has the noise of the first level already: it is denoised, and nothing is known for sure (P = 0)."""

    def project(self, x: Images) -> Images:
        return jnp.zeros_like(x)

    def start(self, images: Images, noise: Images) -> Images:
        del noise
        return images

    def shown(self, images: Images) -> Images:
        return images

    def default_sigmas(self, image_size: int) -> tuple[float, ...]:
        raise InputError("Say how noisy the images are, e.g. sigmas=(0.5,): the first level is that of their noise.")
