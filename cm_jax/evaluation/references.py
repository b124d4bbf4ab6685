"""Statistics of reference sets: files of OpenAI's evaluator, and a cache keyed by content."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cm_jax.errors import InputError
from cm_jax.evaluation.feature_extractor import FeatureExtractor, FeatureStatistics, summarize
from cm_jax.evaluation.image_sets import ImageSet, Watch, of_dataset, open_images, unwatched
from cm_jax.evaluation.metrics import Gaussian
from cm_jax.feature_networks.inception_v3 import CHANNELS
from cm_jax.io.atomic import atomic_write, user_path, write_errors
from cm_jax.io.npz import read_npz

log = logging.getLogger("cm_jax.evaluation")

_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Names of mean and covariance in files of OpenAI's evaluator."""
_VERSION = "1"
"""Version of the cache entries."""


def default_cache() -> Path:
    """The cache folder for statistics of references."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "cm_jax" / "references"


def open_reference(name: str, needs: Iterable[str], shape: tuple[int, int, int]) -> ImageSet | FeatureStatistics:
    """Statistics from an .npz file if it has all of `needs`, else images of this shape."""
    path = user_path(name)
    if path.suffix.lower() == ".npz" and path.is_file():
        known = read_statistics(path)
        if known is not None and all(getattr(known, need) is not None for need in needs):
            return known
        try:
            return of_dataset(open_images(name), name)
        except InputError:
            if known is None:
                raise
            return known  # the caller reports which statistics are missing
    return of_dataset(open_images(name, shape), name)


def read_statistics(path: Path) -> FeatureStatistics | None:
    """mu and sigma (mu_s and sigma_s) of an .npz file of OpenAI's evaluator; None if it has none.

    Raises InputError for other files and for inconsistent statistics.
    """
    names: list[str] = []

    def statistics(found_names: list[str]) -> list[str]:
        names.extend(found_names)
        return [key for keys in _KEYS.values() for key in keys if key in found_names]

    try:
        found = read_npz(path, statistics)
    except ValueError as error:
        raise InputError(f"{path} cannot be used as a reference: {error}.") from error
    gaussians = {}
    for use, (mean, covariance) in _KEYS.items():
        if (mean in found) != (covariance in found):
            missing = covariance if mean in found else mean
            raise InputError(f"{path} has no {missing}; it has {', '.join(sorted(names))}. Both are needed.")
        if mean in found:
            gaussians[use] = _checked(path, found[mean], found[covariance], (mean, covariance))
    return FeatureStatistics(None, **gaussians) if gaussians else None


def _checked(path: Path, mean: np.ndarray, covariance: np.ndarray, names: tuple[str, str]) -> Gaussian:
    shapes = f"{names[0]} {mean.dtype} {list(mean.shape)}, {names[1]} {covariance.dtype} {list(covariance.shape)}"
    if (
        mean.ndim != 1
        or covariance.shape != (mean.size, mean.size)
        or {mean.dtype.kind, covariance.dtype.kind} != {"f"}
    ):
        raise InputError(f"{path}: expected a mean [{CHANNELS}] and covariance [{CHANNELS}, {CHANNELS}], got {shapes}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: {' or '.join(names)} has NaN or infinite values. Compute it again.")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def write_statistics(path: Path, summary: FeatureStatistics) -> None:
    """Write statistics for `read_statistics` and OpenAI's evaluator. Raises InputError if there are none."""
    arrays: dict[str, np.ndarray] = {}
    for use, names in _KEYS.items():
        if (gaussian := getattr(summary, use)) is not None:
            arrays |= dict(zip(names, gaussian, strict=True))
    if not arrays:
        raise InputError("Statistics exist only for fid and sfid: add one of them to the metrics.")
    _save(path, arrays)


def cached_statistics(
    extractor: FeatureExtractor,
    images: ImageSet,
    needs: Iterable[str],
    *,
    cache: Path | None,
    batch_size: int | None = None,
    watch: Watch = unwatched,
) -> FeatureStatistics:
    """`summarize` with a cache: one file per need, named by a hash of pixels, weights and resizing."""
    needs = tuple(needs)
    if not needs:
        return FeatureStatistics(images.count)
    if cache is None:
        return summarize(extractor, watch(images.batches(), images.count), needs, batch_size=batch_size)
    content = "\n".join((_VERSION, images.digest(), extractor.digest, extractor.resize))
    stem = hashlib.sha256(content.encode()).hexdigest()[:32]
    paths = {need: cache / f"{stem}-{need}.npz" for need in needs}
    found: dict[str, Any] = {}
    for need, path in paths.items():
        with contextlib.suppress(ValueError, KeyError):  # missing or damaged
            file = read_npz(path, lambda names: names)
            found[need] = file["features"] if "features" in file else Gaussian(file["mean"], file["covariance"])
    missing = paths.keys() - found.keys()
    if missing:
        new = summarize(extractor, watch(images.batches(), images.count), missing, batch_size=batch_size)
        for need in missing:
            found[need] = value = getattr(new, need)
            try:
                _save(paths[need], {"features": value} if isinstance(value, np.ndarray) else value._asdict())
            except InputError as error:
                log.warning("Cannot cache the statistics of the reference: %s", error)
    return FeatureStatistics(images.count, **found)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as beside, write_errors(path), beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
