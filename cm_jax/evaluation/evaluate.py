"""Evaluate samples against a reference."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm_jax.errors import InputError, check_int, nearest
from cm_jax.evaluation.feature_extractor import FeatureExtractor, FeatureStatistics, summarize
from cm_jax.evaluation.image_sets import ImageSet, Watch, unwatched
from cm_jax.evaluation.metrics import Report, frechet_distance, inception_score, kernel_distance, overlap
from cm_jax.evaluation.references import cached_statistics
from cm_jax.feature_networks.inception_v3 import CHANNELS

NEEDS = {
    "fid": ("pool",),
    "sfid": ("spatial",),
    "kid": ("features",),
    "is": ("logits",),
    "pr": ("features",),
    "prdc": ("features",),
}
"""Metric -> the fields of FeatureStatistics that it needs."""

_NEIGHBORS = {"pr": 3, "prdc": 5}
_TITLES = {"fid": "FID", "sfid": "sFID", "kid": "KID", "inception_score": "IS"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Metrics and their parameters. The defaults are those of the papers that introduced the metrics."""

    metrics: tuple[str, ...] = ("fid",)
    """Any of fid, sfid, kid, is, pr (precision and recall), prdc (with density and coverage)."""
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0
    """Seed of the KID subsets."""
    splits: int = 10
    """Number of splits of the Inception score."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in NEEDS:
                raise InputError(f"Unknown metric {metric!r}: choose from {', '.join(NEEDS)}.{nearest(metric, NEEDS)}")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"Expected one or more metrics, each once, got {','.join(self.metrics) or 'none'}.")
        check_int("kid_subsets", self.kid_subsets, 1, 10**6)
        check_int("kid_subset_size", self.kid_subset_size, 2, 10**6)
        check_int("splits", self.splits, 1, 10**6)
        check_int("The seed", self.seed, 0, 2**32 - 1)

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of FeatureStatistics that the samples need."""
        return tuple(dict.fromkeys(need for metric in self.metrics for need in NEEDS[metric]))

    @property
    def reference_needs(self) -> tuple[str, ...]:
        """Fields of FeatureStatistics that the reference needs."""
        return tuple(need for need in self.needs if need != "logits")

    def min_count(self, metric: str) -> int:
        """Smallest number of images for which a metric is defined."""
        if metric == "is":
            return self.splits
        return _NEIGHBORS[metric] + 1 if metric in _NEIGHBORS else 2


def evaluate(
    extractor: FeatureExtractor,
    samples: ImageSet,
    reference: ImageSet | FeatureStatistics,
    eval_config: EvalConfig = EvalConfig(),
    *,
    reference_name: str = "",
    cache: Path | None = None,
    batch_size: int | None = None,
    watch: Watch = unwatched,
) -> tuple[Report, FeatureStatistics]:
    """(report, statistics of the reference), the latter cached in the folder `cache` if given.

    reference: images, or statistics from a file (FID and sFID only). Raises InputError, before any computation, for
    sets that are too small or differ in image size, and for statistics that lack what a metric needs.
    """
    check(extractor, samples, reference, eval_config, reference_name)
    if isinstance(reference, ImageSet):
        reference_name, needs = reference_name or reference.name, eval_config.reference_needs
        known = cached_statistics(extractor, reference, needs, cache=cache, batch_size=batch_size, watch=watch)
    else:
        known = reference
    seen = summarize(extractor, watch(samples.batches(), samples.count), eval_config.needs, batch_size=batch_size)
    values = compare(seen, known, eval_config)
    protocol: dict[str, Any] = {
        "count": seen.count,
        "samples": samples.name,
        "sampling": samples.how,
        "reference": reference_name,
        "reference_count": known.count,
        "size": list(samples.shape),
        "resize": extractor.resize,
        "features": extractor.name + ("" if extractor.published else ", NOT the published weights"),
        "weights_sha256": extractor.digest,
    }
    if "kid" in eval_config.metrics:
        protocol |= {"kid_subsets": eval_config.kid_subsets, "kid_seed": eval_config.seed}
        protocol["kid_subset_size"] = min(eval_config.kid_subset_size, seen.count or 0, known.count or 0)
    if "is" in eval_config.metrics:
        protocol["splits"] = eval_config.splits
    protocol |= {f"{metric}_neighbors": k for metric, k in _NEIGHBORS.items() if metric in eval_config.metrics}
    return Report(values, protocol, _line(values, protocol)), known


def compare(samples: FeatureStatistics, reference: FeatureStatistics, eval_config: EvalConfig) -> dict[str, float]:
    """Metrics by name, with the standard deviation of an estimate under NAME_deviation.

    Both statistics must have the fields in `EvalConfig.needs`.
    """
    values: dict[str, float] = {}
    real, generated = reference.features, samples.features
    for metric in eval_config.metrics:
        if metric in ("fid", "sfid"):
            use = NEEDS[metric][0]
            values[metric] = frechet_distance(getattr(reference, use), getattr(samples, use))
        elif metric == "is":
            assert samples.logits is not None
            score = inception_score(samples.logits, splits=eval_config.splits)
            values |= {"inception_score": score.mean, "inception_score_deviation": score.std}
        else:
            assert real is not None
            assert generated is not None
            if metric == "kid":
                subsets, size = eval_config.kid_subsets, eval_config.kid_subset_size
                kid = kernel_distance(real, generated, subsets=subsets, size=size, seed=eval_config.seed)
                values |= {"kid": kid.mean, "kid_deviation": kid.std}
            else:
                found = overlap(real, generated, _NEIGHBORS[metric])._asdict()
                values |= {name: found[name] for name in (("precision", "recall") if metric == "pr" else found)}
    return values


def _line(values: dict[str, float], protocol: dict[str, Any]) -> str:
    """Values and protocol in one line."""
    counted = f"{protocol['reference_count']:,} of " if protocol["reference_count"] else ""
    samples = f"{protocol['count']:,} of {protocol['samples']}"
    if how := protocol["sampling"]:
        levels = ", ".join(f"{sigma:.4g}" for sigma in how["sigmas"][:4]) + (", ..." if how["steps"] > 4 else "")
        steps = f"{how['steps']} step{'s' if how['steps'] > 1 else ''}"
        samples += f" ({how['sampler']}, {steps}, sigma {levels}, seed {how['seed']})"
    parts = [
        f"N = {samples} against {counted}{protocol['reference']}",
        f"{protocol['size'][0]} x {protocol['size'][1]} pixels in 8 bits, {protocol['resize']}",
        protocol["features"],
    ]
    if "kid" in values:
        parts.append(f"KID of {protocol['kid_subsets']} subsets of {protocol['kid_subset_size']:,}")
    if ("fid" in values or "sfid" in values) and protocol["count"] < CHANNELS:
        parts.append("FID is biased upwards at small N: compare at equal N only")
    return f"{format_values(values)} [{'; '.join(parts)}]"


def format_values(values: Mapping[str, float]) -> str:
    """FID 12.3, KID 0.0123 ± 0.0012."""
    shown = []
    for name, value in values.items():
        if not name.endswith("_deviation"):
            spread = values.get(f"{name}_deviation")
            shown.append(f"{_TITLES.get(name, name)} {value:.4g}" + (f" ± {spread:.2g}" if spread is not None else ""))
    return ", ".join(shown)


def check(
    extractor: FeatureExtractor,
    samples: ImageSet,
    reference: ImageSet | FeatureStatistics,
    eval_config: EvalConfig,
    name: str,
) -> None:
    """Raise InputError if the metrics cannot be computed from these sets."""
    if "is" in eval_config.metrics and not extractor.has_logits:
        summarize(extractor, [], ["logits"])
    for metric in eval_config.metrics:
        minimum = eval_config.min_count(metric)
        if samples.count < minimum:
            raise InputError(f"{metric} needs at least {minimum} images; {samples.name} has {samples.count}.")
        if metric != "is" and isinstance(reference, ImageSet) and reference.count < minimum:
            raise InputError(f"{metric} needs at least {minimum} images; {reference.name} has {reference.count}.")
        if isinstance(reference, FeatureStatistics):
            missing = [need for need in NEEDS[metric] if need != "logits" and getattr(reference, need) is None]
            if missing:
                needed = "mu_s and sigma_s" if metric == "sfid" else "mu and sigma" if metric == "fid" else "images"
                raise InputError(f"{metric} needs {needed} of the reference, which {name or 'the file'} does not have.")
    if {"pr", "prdc"} <= set(eval_config.metrics):
        raise InputError("pr and prdc both give precision and recall, with 3 and 5 neighbors: choose one of them.")
    if isinstance(reference, ImageSet) and reference.shape[:2] != samples.shape[:2]:
        sizes = [" x ".join(map(str, each.shape[:2])) for each in (samples, reference)]
        raise InputError(
            f"{samples.name} has images of {sizes[0]} pixels, {reference.name} of {sizes[1]}. Resize one of them with "
            "care: resizing changes FID by more than models differ."
        )
