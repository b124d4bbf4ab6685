"""Statistics of reference sets: files of the original evaluator, and a cache by content."""

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
from cm_jax.evaluation.moments import Gaussian
from cm_jax.feature_networks.inception_v3 import CHANNELS
from cm_jax.io.atomic import atomic_write, user_path, write_errors
from cm_jax.io.npz import read_npz

log = logging.getLogger("cm_jax.evaluation")

_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""What the original evaluator calls mean and covariance."""
_VERSION = "1"
"""Of what is in the cache."""


def default_cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "cm_jax" / "references"


def open_reference(name: str, needs: Iterable[str], shape: tuple[int, int, int]) -> ImageSet | FeatureStatistics:
    """What `name` means as a reference for images of this shape: the statistics in a file where it has all that is
    needed, else images, as `open_images` finds them.
    """
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
            return known  # whose complaint says what is missing
    return of_dataset(open_images(name, shape), name)


def read_statistics(path: Path) -> FeatureStatistics | None:
    """mu and sigma (mu_s and sigma_s) of an .npz file of the original evaluator; None where it has none.

    Raises InputError for a file that is none, or whose statistics do not belong together.
    """
    names: list[str] = []

    def wanted(there: list[str]) -> list[str]:
        names.extend(there)
        return [key for keys in _KEYS.values() for key in keys if key in there]

    try:
        found = read_npz(path, wanted)
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
        raise InputError(f"{path} has {shapes}; wanted: a mean [{CHANNELS}] and a covariance [{CHANNELS}, {CHANNELS}].")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: {' or '.join(names)} has numbers that are NaN or infinite. Compute it again.")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def write_statistics(path: Path, summary: FeatureStatistics) -> None:
    """What `read_statistics` and the original evaluator read."""
    arrays: dict[str, np.ndarray] = {}
    for use, names in _KEYS.items():
        if (gaussian := getattr(summary, use)) is not None:
            arrays |= dict(zip(names, gaussian, strict=True))
    if not arrays:
        raise InputError("Statistics are written where fid or sfid is among the metrics: ask for one.")
    _save(path, arrays)


def summarised(
    extractor: FeatureExtractor,
    images: ImageSet,
    needs: Iterable[str],
    *,
    cache: Path | None,
    batch_size: int | None = None,
    watch: Watch = unwatched,
) -> FeatureStatistics:
    """As `summarise`, from the cache where the same weights have seen the same pixels before.

    One file for each need, named by a hash of pixels, weights and resizing.
    """
    needs = tuple(needs)
    if not needs:
        return FeatureStatistics(images.count)
    if cache is None:
        return summarize(extractor, watch(images.batches(), images.count), needs, batch_size=batch_size)
    content = "\n".join((_VERSION, images.digest(), extractor.digest, extractor.resize))
    stem = hashlib.sha256(content.encode()).hexdigest()[:32]
    places = {need: cache / f"{stem}-{need}.npz" for need in needs}
    found: dict[str, Any] = {need: value for need, place in places.items() if (value := _cached(place)) is not None}
    missing = places.keys() - found.keys()
    if missing:
        new = summarize(extractor, watch(images.batches(), images.count), missing, batch_size=batch_size)
        for need in missing:
            found[need] = getattr(new, need)
            _keep(places[need], found[need])
    return FeatureStatistics(images.count, **found)


def _cached(place: Path) -> Gaussian | np.ndarray | None:
    """What lies in the cache; None where there is nothing, or nothing whole."""
    try:
        file = read_npz(place, lambda names: names)
        return file["features"] if "features" in file else Gaussian(file["mean"], file["covariance"])
    except (ValueError, KeyError):
        return None


def _keep(place: Path, value: Gaussian | np.ndarray) -> None:
    """Into the cache; a cache that cannot be written is told of, and nothing is lost."""
    arrays = {"features": value} if isinstance(value, np.ndarray) else value._asdict()
    try:
        _save(place, arrays)
    except InputError as error:
        log.warning("The reference is not kept for the next time: %s", error)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as beside, write_errors(path), beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
