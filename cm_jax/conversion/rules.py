"""One table of rules between a foreign checkpoint and ours, applied in either direction without loss.

A rule says: these tensors of theirs, laid out our way and joined along the last axis, are that leaf of ours. The
rules of a network name every leaf of ours and every tensor of theirs exactly once, so that a conversion is a bijection.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping

import numpy as np

from cm_jax.io.safetensors import LazyTensor, check_finite, check_tensors
from cm_jax.types import Params, leaves, nested


class Layout(enum.Enum):
    """How others lay a leaf out: (from theirs to ours, from ours to theirs)."""

    SAME = (lambda a: a, lambda a: a)
    """Norms, biases, class tables; of Flax programs nearly everything."""
    DENSE = (lambda a: a.T, lambda a: a.T)
    """[out, in] <-> [in, out]."""
    POINTWISE = (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
    """A 1x1 convolution [out, in, 1, 1] <-> [in, out]."""
    CONVOLUTION = (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
    """[out, in, height, width] <-> [height, width, in, out]."""
    FLAX_POINTWISE = (lambda a: a[0, 0], lambda a: a[None, None])
    """A 1x1 convolution [1, 1, in, out] <-> [in, out]."""
    FLAX_HEAD = (lambda a: a[0, 0, :, 0], lambda a: a[None, None, :, None])
    """A 1x1 convolution to one channel [1, 1, in, 1] <-> [in]."""
    TORCH_HEAD = (lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])
    """The same [1, in, 1, 1] <-> [in]."""

    def __init__(self, to_ours: Callable, to_theirs: Callable) -> None:
        self.to_ours, self.to_theirs = to_ours, to_theirs


@dataclasses.dataclass(frozen=True)
class Rule:
    """Leaf `ours` ("middle/attention/qkv/kernel") is the tensors `theirs` in `layout`, joined."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each of their tensors for our leaf of `shape`."""
        part = (*shape[:-1], shape[-1] // len(self.theirs))
        return self.layout.to_theirs(np.broadcast_to(np.float32(0), part)).shape


Tensors = Mapping[str, LazyTensor]


def to_ours(rules: list[Rule], shapes: Params, tensors: Tensors, *, source: str) -> Params:
    """Our parameter tree, as NumPy arrays in their dtype, from all of `tensors`.

    `shapes` is what `network.shapes()` returns. One tensor is in memory beside the result at a time. Raises InputError
    with every missing, superfluous and wrong-shaped tensor in one message that starts with `source`.
    """
    expected = dict(leaves(shapes))
    assert sorted(expected) == sorted(rule.ours for rule in rules), "the rules do not cover our leaves"
    wanted = {name: rule.their_shape(expected[rule.ours].shape) for rule in rules for name in rule.theirs}
    check_tensors(wanted, tensors, source)
    flat, not_finite = {}, []
    for rule in rules:
        parts = [tensors[name].read() for name in rule.theirs]
        not_finite += [name for name, part in zip(rule.theirs, parts, strict=True) if not np.isfinite(part).all()]
        laid_out = [rule.layout.to_ours(part) for part in parts]
        flat[rule.ours] = np.ascontiguousarray(laid_out[0] if len(parts) == 1 else np.concatenate(laid_out, axis=-1))
    check_finite(not_finite, source)
    return nested(flat)


def to_theirs(rules: list[Rule], params: Params) -> dict[str, np.ndarray]:
    """Their tensors by name, in the order of the rules: the inverse of `to_ours`, bit for bit."""
    ours = dict(leaves(params))
    result = {}
    for rule in rules:
        parts = np.split(np.asarray(ours[rule.ours]), len(rule.theirs), axis=-1)
        for name, part in zip(rule.theirs, parts, strict=True):
            result[name] = np.ascontiguousarray(rule.layout.to_theirs(part))
    return result
