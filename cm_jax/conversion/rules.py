"""Rules that map the tensors of a third-party checkpoint to the parameters of a network and back, without loss.

A rule says which source tensors, transposed and concatenated along the last axis, form one parameter. The rules of a
network name every parameter and every source tensor exactly once, so that a conversion is a bijection.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping

import numpy as np

from cm_jax.io.safetensors import LazyTensor, check_finite, check_tensors
from cm_jax.types import Params, leaves, nested

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, LazyTensor]


class Layout(enum.Enum):
    """Layouts of source tensors: (source -> parameter, parameter -> source)."""

    SAME = (lambda a: a, lambda a: a)
    """Norms, biases, class embeddings; nearly all tensors of Flax programs."""
    DENSE = (lambda a: a.T, lambda a: a.T)
    """[out, in] <-> [in, out]."""
    POINTWISE = (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
    """A 1x1 convolution [out, in, 1, 1] <-> [in, out]."""
    CONVOLUTION = (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
    """[out, in, height, width] <-> [height, width, in, out]."""
    INTERLEAVED = (
        lambda a: a[:, :, 0, 0].reshape(-1, 3, a.shape[1]).transpose(2, 1, 0).reshape(a.shape[1], -1),
        lambda a: a.reshape(a.shape[0], 3, -1).transpose(2, 1, 0).reshape(-1, a.shape[0])[:, :, None, None],
    )
    """Queries, keys and values [(channel, 3), in, 1, 1] <-> [in, (3, channel)], as in the EDM family."""
    INTERLEAVED_BIAS = (lambda a: a.reshape(-1, 3).T.reshape(-1), lambda a: a.reshape(3, -1).T.reshape(-1))
    """Their biases [(channel, 3)] <-> [(3, channel)]."""
    FLAX_POINTWISE = (lambda a: a[0, 0], lambda a: a[None, None])
    """A 1x1 convolution [1, 1, in, out] <-> [in, out]."""
    FLAX_HEAD = (lambda a: a[0, 0, :, 0], lambda a: a[None, None, :, None])
    """A 1x1 convolution to one channel [1, 1, in, 1] <-> [in]."""
    TORCH_HEAD = (lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])
    """A 1x1 convolution to one channel [1, in, 1, 1] <-> [in]."""

    def __init__(self, from_source: Callable, to_source: Callable) -> None:
        self.from_source, self.to_source = from_source, to_source


@dataclasses.dataclass(frozen=True)
class Rule:
    """The parameter `path` ("middle/attention/qkv/kernel") is the tensors `sources` in `layout`, concatenated."""

    path: str
    sources: tuple[str, ...]
    layout: Layout

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each source tensor for a parameter of `shape`."""
        part = (*shape[:-1], shape[-1] // len(self.sources)) if shape else shape
        return self.layout.to_source(np.broadcast_to(np.float32(0), part)).shape


def source_shapes(rules: list[Rule], shapes: Params) -> dict[str, tuple[int, ...]]:
    """Name and shape of every source tensor of a network, in the order of the rules; `shapes` is `network.shapes()`."""
    flat = dict(leaves(shapes))
    return {name: rule.source_shape(flat[rule.path].shape) for rule in rules for name in rule.sources}


def from_source(rules: list[Rule], shapes: Params, tensors: Tensors, *, source: str) -> Params:
    """The parameter tree, as NumPy arrays in their stored dtype, from all of `tensors`.

    `shapes` is `network.shapes()`. Holds one source tensor in memory beside the result at a time. Raises InputError
    that lists all missing, unexpected and wrong-shaped tensors in one message that starts with `source`.
    """
    paths = [path for path, _ in leaves(shapes)]
    assert sorted(paths) == sorted(rule.path for rule in rules), "the rules do not cover the parameters"
    check_tensors(source_shapes(rules, shapes), tensors, source)
    flat, not_finite = {}, []
    for rule in rules:
        parts = [tensors[name].read() for name in rule.sources]
        not_finite += [name for name, part in zip(rule.sources, parts, strict=True) if not np.isfinite(part).all()]
        laid_out = [rule.layout.from_source(part) for part in parts]
        flat[rule.path] = np.asarray(laid_out[0] if len(parts) == 1 else np.concatenate(laid_out, axis=-1), order="C")
    check_finite(not_finite, source)
    return nested(flat)


def to_source(rules: list[Rule], params: Params) -> dict[str, np.ndarray]:
    """Source tensors by name, in the order of the rules: the inverse of `from_source`, bitwise."""
    flat = dict(leaves(params))
    assert sorted(flat) == sorted(rule.path for rule in rules), "the rules do not cover the parameters"
    result = {}
    for rule in rules:
        array, count = np.asarray(flat[rule.path]), len(rule.sources)
        parts = np.split(array, count, axis=-1) if count > 1 else [array]
        for name, part in zip(rule.sources, parts, strict=True):
            result[name] = np.asarray(rule.layout.to_source(part), order="C")
    return result
