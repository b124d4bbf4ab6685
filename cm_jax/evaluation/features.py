"""Features of sets of images, computed in batches on all devices, their statistics, and files of statistics."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cm_jax.conversion import metric_networks
from cm_jax.errors import InputError
from cm_jax.evaluation.image_sets import UNIT, ImageSet, of_dataset, open_images
from cm_jax.evaluation.metrics import Gaussian, Moments
from cm_jax.feature_networks import inception_v3
from cm_jax.feature_networks.inception_v3 import Features
from cm_jax.io.atomic import atomic_write, user_path, write_errors
from cm_jax.io.npz import read_npz
from cm_jax.parallelism import Parallelism, choose_for_images
from cm_jax.parallelism.processes import from_all, in_any, raised_in_all, share_of_process
from cm_jax.progress import activity, counted
from cm_jax.samplers.batches import in_batches, multiple_of
from cm_jax.types import Params

log = logging.getLogger("cm_jax.evaluation")

PER_DEVICE = 32
"""Images per device and batch."""
_MOMENTS_BATCH = 1024
"""Images per update of mean and covariance, whose cost in small batches would be memory bandwidth."""
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Names of mean and covariance in files of OpenAI's evaluator."""
_CACHE_VERSION = "1"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A feature network with its weights, and how to run it."""

    extract: Callable[[Params, UInt8[Array, "b h w 3"]], Features]
    """(params, 8-bit RGB images) -> features."""
    params: Params = dataclasses.field(repr=False)
    name: str
    """Name of the network in reports."""
    resize: str
    """Name of the resizing method in reports."""
    batch_size: int | None = None
    """Images per batch over all devices. Default: 32 per device."""
    parallelism: Parallelism | None = None
    """Default: all local devices."""
    shared: bool = False
    """Whether all processes evaluate together, each a share of the images."""
    cache: Path | None = None
    """Folder for statistics of references. Default: they are not kept."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return metric_networks.digest(self.params)

    def count(self, need: str, shape: tuple[int, ...]) -> int:
        """Number of features for "pool" or "spatial" of images [h, w, c]."""
        images = jax.ShapeDtypeStruct((1, *shape[:2], 3), np.uint8)
        return getattr(jax.eval_shape(self.extract, self.params, images), need).shape[-1]

    @property
    def published(self) -> bool:
        """Whether these are the published weights of Inception-V3."""
        return self.digest == metric_networks.INCEPTION_DIGEST


def load_inception(weights: str = "") -> FeatureExtractor:
    """Inception-V3 of 2015-12-05 from the file `weights` or CM_JAX_INCEPTION. Raises InputError if there is none."""
    shapes = (inception_v3.shapes(classifier=classifier) for classifier in (False, True))
    with activity("Reading Inception-V3"):
        params = inception_v3.FILE.load(weights, *shapes)
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
    name: str = "the file"
    """Name of the set in reports."""


Reference = ImageSet | FeatureStatistics


def summarize(
    extractor: FeatureExtractor, batches: Iterable[UInt8[np.ndarray, "b h w c"]], needs: Iterable[str]
) -> FeatureStatistics:
    """Statistics of all images in `batches`.

    needs: fields of FeatureStatistics to compute. Raises InputError for an empty set, and for logits without a
    classifier.
    """
    return _statistics([_sums(extractor, batches, set(needs))])


def summarize_set(extractor: FeatureExtractor, images: ImageSet, needs: Iterable[str], title: str) -> FeatureStatistics:
    """The same of a set, of which each process computes a share if the extractor is shared. title: for progress."""
    if not extractor.shared:
        return summarize(extractor, counted(images.batches(), images.count, title), needs)
    first, last = share_of_process(images.count, UNIT)
    with raised_in_all():
        batches = images.read(first, last) if first < last else ()
        own = _sums(extractor, counted(batches, last - first, title), set(needs))
    return _statistics(from_all(own))


def _sums(
    extractor: FeatureExtractor, batches: Iterable[UInt8[np.ndarray, "b h w c"]], needs: set[str]
) -> dict[str, np.ndarray]:
    """What `_statistics` of several shares need of each: {"pool/count", "pool/mean", "pool/scatter", "features"}."""
    if "logits" in needs and "logits" not in extractor.params:
        raise InputError(
            f"The Inception score needs logits; these weights of {extractor.name} have no classifier. Convert a file "
            "that has one (from pytorch-fid or NVIDIA; docs/conversion.md), or remove `is` from the metrics."
        )
    parallelism = extractor.parallelism or choose_for_images()
    devices = len(parallelism.devices)
    size = multiple_of(devices, extractor.batch_size or PER_DEVICE * devices)

    def padded() -> Iterator[tuple[int, tuple[np.ndarray]]]:
        for images in regroup(batches, size):
            rgb = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
            yield len(rgb), (rgb[np.minimum(np.arange(size), len(rgb) - 1)],)

    static = extractor.extract, tuple(sorted({"pool" if need == "features" else need for need in needs}))
    features = in_batches(
        named_features, static, (extractor.params,), padded(), parallelism, name="the feature network", ahead=1
    )
    moments: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {need: [] for need in needs & {"features", "logits"}}
    for found in regroup(features, _MOMENTS_BATCH):
        if not all(np.isfinite(values).all() for values in found.values()):
            raise InputError("The features are not finite: the weights are damaged. Convert them again.")
        for need in needs & {"pool", "spatial"}:
            new = Moments.of(found[need])
            moments[need] = moments[need].merged(new) if need in moments else new
        for need, parts in kept.items():
            parts.append(found["pool" if need == "features" else need])
    values = {need: vars(each).items() for need, each in moments.items()}
    fields = {f"{need}/{name}": np.asarray(value) for need, items in values.items() for name, value in items}
    return fields | {need: np.concatenate(parts) for need, parts in kept.items() if parts}


def _statistics(shares: Iterable[dict[str, np.ndarray]]) -> FeatureStatistics:
    """Statistics of the images of all shares, in their order."""
    moments: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {}
    for share in shares:
        for need in {name.partition("/")[0] for name in share}:
            if need in share:
                kept.setdefault(need, []).append(share[need])
                continue
            new = Moments(int(share[f"{need}/count"]), share[f"{need}/mean"], share[f"{need}/scatter"])
            moments[need] = moments[need].merged(new) if need in moments else new
    counts = [*(each.count for each in moments.values()), *(sum(map(len, parts)) for parts in kept.values())]
    if not counts:
        raise InputError("There are no images to evaluate.")
    statistics: dict[str, Any] = {need: each.gaussian() for need, each in moments.items()}
    statistics |= {need: np.concatenate(parts) for need, parts in kept.items()}
    return FeatureStatistics(counts[0], **statistics)


def regroup(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The same rows of arrays, or of trees of arrays, `size` rows at a time; the last group may be smaller."""
    waiting = None
    for batch in batches:
        waiting = batch if waiting is None else jax.tree.map(lambda *pair: np.concatenate(pair), waiting, batch)
        while _rows(waiting) >= size:
            yield jax.tree.map(lambda array: array[:size], waiting)
            waiting = jax.tree.map(lambda array: array[size:], waiting)
    if waiting is not None and _rows(waiting):
        yield waiting


def _rows(batch: Any) -> int:
    return len(jax.tree.leaves(batch)[0])


def named_features(
    extract: Callable[[Params, Array], Features], names: tuple[str, ...], params: Params, images: Array
) -> dict[str, Array]:
    """The features with these names; the compiler removes the computation of all others."""
    found = extract(params, images)
    return {name: getattr(found, name) for name in names}


def reference_statistics(extractor: FeatureExtractor, reference: Reference, needs: Iterable[str]) -> FeatureStatistics:
    """Statistics from a file as they are; of images, with a cache: a file per need, named by a hash of all inputs.

    The Inception score needs no logits of a reference.
    """
    if isinstance(reference, FeatureStatistics):
        return reference
    needs, paths = set(needs) - {"logits"}, {}
    found: dict[str, Any] = {}
    if needs and extractor.cache is not None:
        with activity(f"Reading {reference.name}"), raised_in_all() if extractor.shared else contextlib.nullcontext():
            digest = reference.digest()
        content = "\n".join((_CACHE_VERSION, digest, extractor.digest, extractor.resize))
        stem = hashlib.sha256(content.encode()).hexdigest()[:32]
        paths = {need: extractor.cache / f"{stem}-{need}.npz" for need in needs}
    for need, path in paths.items():
        with contextlib.suppress(ValueError, KeyError):  # missing or damaged
            file = read_npz(path, lambda names: names)
            found[need] = file["features"] if "features" in file else Gaussian(file["mean"], file["covariance"])
    in_some = in_any if extractor.shared else bool
    missing = {need for need in sorted(needs) if in_some(need not in found)}
    if missing:
        new = summarize_set(extractor, reference, missing, f"Computing features of {reference.name}")
        found |= {need: getattr(new, need) for need in missing}
    for need in missing & paths.keys():
        value = found[need]
        try:
            _save(paths[need], {"features": value} if isinstance(value, np.ndarray) else value._asdict())
        except InputError as error:
            log.warning("Cannot cache the statistics of the reference: %s", error)
    return FeatureStatistics(reference.count, **found, name=reference.name)


def open_reference(name: str, needs: Iterable[str], shape: tuple[int, int, int]) -> Reference:
    """Statistics from an .npz file if it has all of `needs`, else images of this shape."""
    path = user_path(name)
    known = read_statistics(name) if path.suffix.lower() == ".npz" and path.is_file() else None
    if known is not None and all(getattr(known, need) is not None for need in needs if need != "logits"):
        return known
    try:
        return of_dataset(open_images(name, shape), name)
    except InputError:
        if known is None:
            raise
        return known  # the caller reports which statistics are missing


def read_statistics(path: str | Path) -> FeatureStatistics | None:
    """mu and sigma (mu_s and sigma_s) of an .npz file of OpenAI's evaluator; None if it has none.

    Raises InputError for other files and for inconsistent statistics.
    """
    try:
        found = read_npz(user_path(path), _statistics_in)
    except ValueError as error:
        raise InputError(f"{path} cannot be used as a reference: {error}.") from error
    gaussians = {}
    for use, names in _KEYS.items():
        if names[0] in found:
            mean, covariance = (found[name] for name in names)
            kinds = {mean.dtype.kind, covariance.dtype.kind}
            if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or kinds != {"f"}:
                shapes = ", ".join(f"{name} {found[name].dtype} {list(found[name].shape)}" for name in names)
                raise InputError(f"{path}: expected a mean [2048] and covariance [2048, 2048], got {shapes}.")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise InputError(f"{path}: {' or '.join(names)} has NaN or infinite values. Compute it again.")
            gaussians[use] = Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
    return FeatureStatistics(None, **gaussians, name=str(path)) if gaussians else None


def _statistics_in(names: list[str]) -> list[str]:
    """The statistics among the arrays of a file. Raises ValueError for a mean without covariance, or the reverse."""
    expected = [key for keys in _KEYS.values() if set(keys) & set(names) for key in keys]
    missing = [key for key in expected if key not in names]
    if missing:
        raise ValueError(f"it has no {missing[0]}; it has {', '.join(sorted(names))}, and both are needed")
    return expected


def write_statistics(path: Path, summary: FeatureStatistics) -> None:
    """Write statistics for `read_statistics` and OpenAI's evaluator. Raises InputError if there are none."""
    arrays: dict[str, np.ndarray] = {}
    for use, names in _KEYS.items():
        if (gaussian := getattr(summary, use)) is not None:
            arrays |= dict(zip(names, gaussian, strict=True))
    if not arrays:
        raise InputError("Statistics exist only for fid and sfid: add one of them to the metrics.")
    _save(path, arrays)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as beside, write_errors(path), beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
