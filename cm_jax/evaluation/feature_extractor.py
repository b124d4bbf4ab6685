"""What a network sees in sets of images: over all devices, a batch at a time, summed up as the metrics need it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cm_jax.conversion import metric_networks
from cm_jax.errors import InputError
from cm_jax.evaluation.moments import Gaussian, Moments
from cm_jax.feature_networks import inception
from cm_jax.feature_networks.inception_v3 import Features
from cm_jax.samplers.batches import compile_programs, in_batches, multiple_of
from cm_jax.types import Params

PER_DEVICE = 32
"""Images that a device sees at once."""
_GATHERED = 1024
"""Features that are gathered before their moments are taken: batch by batch, memory would be the limit."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network that sees features in 8-bit images, its weights, and its name in the protocol."""

    see: Callable[[Params, UInt8[Array, "b h w 3"]], Features]
    params: Params = dataclasses.field(repr=False)
    name: str
    resize: str

    @functools.cached_property
    def digest(self) -> str:
        """Of the weights."""
        return metric_networks.digest(self.params)

    @property
    def published(self) -> bool:
        """Whether its weights are those that papers use."""
        return self.digest == metric_networks.INCEPTION_DIGEST

    @property
    def has_logits(self) -> bool:
        return "logits" in self.params


def load_inception(weights: str = "") -> FeatureExtractor:
    """Inception-V3 of 2015-12-05, from the file that `weights` or CM_JAX_INCEPTION names; InputError without one."""
    params = inception.load(weights)
    return FeatureExtractor(inception.features, params, "Inception-V3 2015-12-05", "TensorFlow 1 bilinear to 299")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """A set of images as the metrics need it: what they did not ask for is None."""

    count: int | None
    """None for statistics from a file that does not say."""
    pool: Gaussian | None = None
    """FID."""
    spatial: Gaussian | None = None
    """sFID."""
    features: Float[np.ndarray, "n d"] | None = None
    """The pooled ones of every image: KID, precision and recall."""
    logits: Float[np.ndarray, "n c"] | None = None
    """The Inception score."""


def summarize(
    extractor: FeatureExtractor,
    batches: Iterable[UInt8[np.ndarray, "b h w c"]],
    needs: Iterable[str],
    *,
    batch_size: int | None = None,
    devices: Sequence[Any] | None = None,
) -> FeatureStatistics:
    """`needs`: fields of Summary. Raises InputError where logits are wanted and the weights have none, and for no
    image at all.
    """
    needs = set(needs)
    if "logits" in needs and not extractor.has_logits:
        raise InputError(
            f"The Inception score needs logits; these weights of {extractor.name} have no classifier. Convert a file "
            "that has one (pytorch-fid's, or NVIDIA's; docs/conversion.md), or leave `is` out of the metrics."
        )
    names = tuple(sorted({"pool" if need == "features" else need for need in needs}))
    moments: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {need: [] for need in needs & {"features", "logits"}}
    count = 0
    looks = _looks(extractor, batches, names, batch_size, list(devices or jax.local_devices()))
    for look in _gathered(looks):
        count += len(next(iter(look.values())))
        for need in needs & {"pool", "spatial"}:
            new = Moments.of(look[need])
            moments[need] = moments[need].merged(new) if need in moments else new
        for need, parts in kept.items():
            parts.append(look["pool" if need == "features" else need])
    if not count:
        raise InputError("There are no images to look at.")
    found: dict[str, Any] = {need: of_need.gaussian() for need, of_need in moments.items()}
    found |= {need: np.concatenate(parts) for need, parts in kept.items()}
    return FeatureStatistics(count, **found)


def chunks(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows, `size` at a time; the last ones may be fewer."""
    waiting: list[np.ndarray] = []
    for array in arrays:
        waiting.append(array)
        if sum(map(len, waiting)) >= size:
            joined = np.concatenate(waiting)
            whole = len(joined) // size * size
            yield from np.split(joined[:whole], whole // size)
            waiting = [joined[whole:]]
    rest = np.concatenate(waiting) if waiting else np.empty(0)
    if len(rest):
        yield rest


def _looks(
    extractor: FeatureExtractor,
    batches: Iterable[np.ndarray],
    names: tuple[str, ...],
    batch_size: int | None,
    devices: list[Any],
) -> Iterator[dict[str, np.ndarray]]:
    """Features in batches; the devices compute the next batch while the host works on one."""
    size = multiple_of(devices, batch_size or PER_DEVICE * len(devices))
    rgb = (np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images for images in chunks(batches, size))
    static, shared = (extractor.see, names), (extractor.params,)
    for look in in_batches(_look, static, shared, ((images,) for images in rgb), size, devices, ahead=1):
        if not all(np.isfinite(values).all() for values in look.values()):
            raise InputError("The network's features are not finite: its weights are damaged. Convert them again.")
        yield look


def named_features(
    see: Callable[[Params, Array], Features], names: tuple[str, ...], params: Params, images: Array
) -> dict[str, Array]:
    """The features with these names; the compiler removes the computation of all others."""
    seen = see(params, images)
    return {name: getattr(seen, name) for name in names}


_look = compile_programs(named_features, static=2, shared=1, per_image=1)


def _gathered(looks: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The same features, a thousand images at a time."""
    waiting: list[dict[str, np.ndarray]] = []

    def joined() -> dict[str, np.ndarray]:
        return {name: np.concatenate([look[name] for look in waiting]) for name in waiting[0]}

    for look in looks:
        waiting.append(look)
        if sum(len(next(iter(each.values()))) for each in waiting) >= _GATHERED:
            yield joined()
            waiting = []
    if waiting:
        yield joined()
