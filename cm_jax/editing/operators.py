"""Operators: orthogonal projections P onto the known part of an image (P P = P, and P x is orthogonal to x - P x).

The paper writes them with an invertible A and a binary mask Omega of the unknown part, P = A^-1 (1 - Omega) A
(CM, algorithm 4). Where one direction v of each pixel or patch is known, P x = v (v . x), and A is not needed.
An operator is a JAX pytree: its arrays have one entry per image, and its other fields are static.
"""

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from cm_jax.errors import InputError, check_int, one_line
from cm_jax.types import Images

_LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the brightness, as in OpenAI's implementation."""


class Operator(abc.ABC):
    """P, and the initial image of an edit."""

    @abc.abstractmethod
    def project(self, x: Images) -> Images:
        """P x: the known part of x."""

    def replace(self, known: Images, x: Images) -> Images:
        """P known + (x - P x) = x + P (known - x): x with the known part of `known`."""
        return x + self.project(known - x)

    def start(self, images: Images, noise: Images) -> Images:
        """x at the first level: the known part plus noise of that level."""
        return self.project(images) + noise

    def preview(self, images: Images) -> Images:
        """The known part as an image to display."""
        return self.project(images)

    def default_sigmas(self, shape: tuple[int, ...]) -> tuple[float, ...] | None:
        """Default noise levels for images [h, w, c]; None for steps from sigma_max.

        Raises InputError where the user must give them.
        """
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise InputError unless the operator applies to images of this shape."""
        del shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Luma(Operator):
    """Colorization: brightness is known, color is not. v is (0.2989, 0.587, 0.114) / |.|, along the channels.

    P x is the same for a picture and its gray version.
    """

    def project(self, x: Images) -> Images:
        v = jnp.asarray(np.array(_LUMA) / np.linalg.norm(_LUMA), x.dtype)
        return v * (v * x).sum(-1, keepdims=True)

    def preview(self, images: Images) -> Images:
        """The gray picture (P x itself is green)."""
        gray = (jnp.asarray(_LUMA, images.dtype) * images).sum(-1, keepdims=True)
        return jnp.broadcast_to(gray, images.shape)

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[-1] != 3:
            raise InputError(f"Expected RGB images for colorization, got {shape[-1]} channel(s).")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchMean(Operator):
    """Super-resolution: the mean of each patch and channel is known. v is constant on patches of size x size pixels."""

    size: int = dataclasses.field(default=8, metadata={"static": True})
    """Side of a patch in pixels; must divide height and width."""

    def __post_init__(self) -> None:
        check_int("The size of a patch", self.size, 1, 2**16)

    def project(self, x: Images) -> Images:
        b, h, w, c = x.shape
        patches = x.reshape(b, h // self.size, self.size, w // self.size, self.size, c)
        return jnp.broadcast_to(patches.mean((2, 4), keepdims=True), patches.shape).reshape(x.shape)

    def check(self, shape: tuple[int, ...]) -> None:
        _, h, w, _ = shape
        if h % self.size or w % self.size:
            sizes = ", ".join(str(size) for size in range(2, min(h, w) + 1) if not (h % size or w % size))
            raise InputError(
                f"Expected a patch size that divides {w} x {h} pixels, got {self.size}; use one of {sizes}."
            )


@dataclasses.dataclass(frozen=True)
class Mask(Operator):
    """Inpainting: some pixels are known, others are not."""

    known: Bool[Array | np.ndarray, "b h w 1"]
    """Whether a pixel is known, for each image."""

    def __post_init__(self) -> None:
        if not hasattr(self.known, "ndim"):
            raise InputError(f"Expected a bool mask as an array [b, h, w, 1], got {one_line(self.known)}.")
        if self.known.ndim != 4 or self.known.shape[-1] != 1 or self.known.dtype != bool:
            raise InputError(
                f"Expected a bool mask [b, h, w, 1], True for known pixels; got {self.known.dtype} "
                f"{list(self.known.shape)}."
            )

    def project(self, x: Images) -> Images:
        return jnp.where(self.known, x, 0)

    def replace(self, known: Images, x: Images) -> Images:
        """x with the known pixels of `known`, bitwise identical."""
        return jnp.where(self.known, known, x)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.known.shape[:3] != shape[:3]:
            raise InputError(f"Expected a mask {[*shape[:3], 1]} for these images, got {list(self.known.shape)}.")


def _unflatten(_: None, leaves: Iterable[Any]) -> Mask:
    """Without __init__ and its checks, because JAX also builds pytrees whose leaves are not arrays."""
    mask = object.__new__(Mask)
    object.__setattr__(mask, "known", *leaves)
    return mask


jax.tree_util.register_pytree_node(Mask, lambda mask: ((mask.known,), None), _unflatten)


class _Unconstrained(Operator):
    """No part is known exactly (P = 0): the image only determines the initial x."""

    def project(self, x: Images) -> Images:
        return jnp.zeros_like(x)

    def preview(self, images: Images) -> Images:
        return images


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strokes(_Unconstrained):
    """SDEdit, from strokes to an image: starts at the image plus noise that hides its details."""

    def start(self, images: Images, noise: Images) -> Images:
        return images + noise

    def default_sigmas(self, shape: tuple[int, ...]) -> tuple[float, ...]:
        """The paper's 5.38 and 2.24 at 256 pixels (CM, appendix D), scaled with the shorter side of the images.

        Noise hides details whose mean over an area it exceeds, and that area has fewer pixels in a smaller image.
        """
        return tuple(sigma * min(shape[:2]) / 256 for sigma in (5.38, 2.24))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy(_Unconstrained):
    """Denoising: starts at the image itself, which already has noise of the first level."""

    def start(self, images: Images, noise: Images) -> Images:
        return images

    def default_sigmas(self, shape: tuple[int, ...]) -> tuple[float, ...]:
        raise InputError("Expected sigmas, e.g. (0.5,): the first is the noise level of the images.")
