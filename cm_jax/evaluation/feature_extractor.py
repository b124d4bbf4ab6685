"""Features of sets of images, computed in batches on all devices, and their statistics."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cm_jax.conversion import metric_networks
from cm_jax.errors import InputError
from cm_jax.evaluation.metrics import Gaussian, Moments
from cm_jax.feature_networks import inception_v3
from cm_jax.feature_networks.inception_v3 import Features
from cm_jax.samplers.batches import compile_programs, in_batches, multiple_of
from cm_jax.types import Params

PER_DEVICE = 32
"""Images per device and batch."""
_MOMENTS_BATCH = 1024
"""Images per update of mean and covariance, whose cost in small batches would be memory bandwidth."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A feature network with its weights."""

    extract: Callable[[Params, UInt8[Array, "b h w 3"]], Features]
    """(params, 8-bit RGB images) -> features."""
    params: Params = dataclasses.field(repr=False)
    name: str
    """Name of the network in reports."""
    resize: str
    """Name of the resizing method in reports."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return metric_networks.digest(self.params)

    @property
    def published(self) -> bool:
        """Whether these are the published weights of Inception-V3."""
        return self.digest == metric_networks.INCEPTION_DIGEST

    @property
    def has_logits(self) -> bool:
        """Whether the weights include the classifier."""
        return "logits" in self.params


def load_inception(weights: str = "") -> FeatureExtractor:
    """Inception-V3 of 2015-12-05 from the file `weights` or CM_JAX_INCEPTION. Raises InputError if there is none."""
    params = inception_v3.load(weights)
    return FeatureExtractor(inception_v3.features, params, "Inception-V3 2015-12-05", "TensorFlow 1 bilinear to 299")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of a set of images; fields that no metric needs are None."""

    count: int | None
    """Number of images; None for statistics from a file without it."""
    pool: Gaussian | None = None
    """Mean and covariance for FID."""
    spatial: Gaussian | None = None
    """Mean and covariance for sFID."""
    features: Float[np.ndarray, "n d"] | None = None
    """Pooled features of every image, for KID, precision and recall."""
    logits: Float[np.ndarray, "n c"] | None = None
    """Logits of every image, for the Inception score."""


def summarize(
    extractor: FeatureExtractor,
    batches: Iterable[UInt8[np.ndarray, "b h w c"]],
    needs: Iterable[str],
    *,
    batch_size: int | None = None,
    devices: Sequence[Any] | None = None,
) -> FeatureStatistics:
    """Statistics of all images in `batches`.

    needs: fields of FeatureStatistics to compute. Raises InputError for an empty set, and for logits without a
    classifier.
    """
    needs = set(needs)
    if "logits" in needs and not extractor.has_logits:
        raise InputError(
            f"The Inception score needs logits; these weights of {extractor.name} have no classifier. Convert a file "
            "that has one (from pytorch-fid or NVIDIA; docs/conversion.md), or remove `is` from the metrics."
        )
    names = tuple(sorted({"pool" if need == "features" else need for need in needs}))
    moments: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {need: [] for need in needs & {"features", "logits"}}
    count = 0
    features = _features(extractor, batches, names, batch_size, list(devices or jax.local_devices()))
    for found in regroup(features, _MOMENTS_BATCH):
        count += _rows(found)
        for need in needs & {"pool", "spatial"}:
            new = Moments.of(found[need])
            moments[need] = moments[need].merged(new) if need in moments else new
        for need, parts in kept.items():
            parts.append(found["pool" if need == "features" else need])
    if not count:
        raise InputError("There are no images to evaluate.")
    statistics: dict[str, Any] = {need: each.gaussian() for need, each in moments.items()}
    statistics |= {need: np.concatenate(parts) for need, parts in kept.items()}
    return FeatureStatistics(count, **statistics)


def regroup(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The same rows of arrays, or of trees of arrays, `size` rows at a time; the last group may be smaller."""
    waiting: list[Any] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(_rows, waiting)) >= size:
            joined = jax.tree.map(lambda *parts: np.concatenate(parts), *waiting)
            whole = _rows(joined) // size * size
            yield from (_slice(joined, start, start + size) for start in range(0, whole, size))
            waiting = [_slice(joined, whole, None)]
    if sum(map(_rows, waiting)):
        yield jax.tree.map(lambda *parts: np.concatenate(parts), *waiting)


def _rows(batch: Any) -> int:
    return len(jax.tree.leaves(batch)[0])


def _slice(batch: Any, start: int, stop: int | None) -> Any:
    return jax.tree.map(lambda array: array[start:stop], batch)


def _features(
    extractor: FeatureExtractor,
    batches: Iterable[np.ndarray],
    names: tuple[str, ...],
    batch_size: int | None,
    devices: list[Any],
) -> Iterator[dict[str, np.ndarray]]:
    """Features in batches; the devices compute the next batch while the host works on one."""
    size = multiple_of(devices, batch_size or PER_DEVICE * len(devices))
    static, shared = (extractor.extract, names), (extractor.params,)

    def padded() -> Iterator[tuple[int, tuple[np.ndarray]]]:
        for images in regroup(batches, size):
            rgb = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
            yield len(rgb), (rgb[np.minimum(np.arange(size), len(rgb) - 1)],)

    for found in in_batches(_extract, static, shared, padded(), devices, ahead=1):
        if not all(np.isfinite(values).all() for values in found.values()):
            raise InputError("The features are not finite: the weights are damaged. Convert them again.")
        yield found


def named_features(
    extract: Callable[[Params, Array], Features], names: tuple[str, ...], params: Params, images: Array
) -> dict[str, Array]:
    """The features with these names; the compiler removes the computation of all others."""
    found = extract(params, images)
    return {name: getattr(found, name) for name in names}


_extract = compile_programs(named_features, static=2, shared=1, per_image=1)
