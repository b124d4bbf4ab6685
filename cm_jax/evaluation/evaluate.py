"""Evaluate samples against a reference."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cm_jax.errors import InputError, check_int, nearest
from cm_jax.evaluation.features import (
    FeatureExtractor,
    FeatureStatistics,
    Reference,
    reference_statistics,
    summarize,
    summarize_set,
)
from cm_jax.evaluation.image_sets import ImageSet
from cm_jax.evaluation.metrics import Report, frechet_distance, inception_score, kernel_distance, overlap
from cm_jax.feature_networks.inception_v3 import CHANNELS
from cm_jax.progress import activity
from cm_jax.samplers.plan import guidance_text, sampler_text

NEEDS = {"fid": "pool", "sfid": "spatial", "kid": "features", "is": "logits", "pr": "features", "prdc": "features"}
"""Metric -> the field of FeatureStatistics that it needs."""

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
        """Fields of FeatureStatistics that the metrics need."""
        return tuple(dict.fromkeys(NEEDS[metric] for metric in self.metrics))


def evaluate(
    extractor: FeatureExtractor, samples: ImageSet, reference: Reference, eval_config: EvalConfig = EvalConfig()
) -> tuple[Report, FeatureStatistics]:
    """(report, statistics of the reference), the latter kept in the cache of the extractor, if it has one.

    reference: images, or statistics from a file (FID and sFID only). Raises InputError, before any computation, for
    sets that are too small or differ in image size, and for statistics that lack what a metric needs.
    """
    check(extractor, samples, reference, eval_config)
    known = reference_statistics(extractor, reference, eval_config.needs)
    seen = summarize_set(extractor, samples, eval_config.needs, f"Evaluating {samples.name}")
    with activity("Computing the metrics"):
        values = compare(seen, known, eval_config)
    protocol: dict[str, Any] = {
        "count": seen.count,
        "samples": samples.name,
        "sampling": samples.how,
        "reference": known.name,
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
    for metric in eval_config.metrics:
        real, generated = (getattr(each, NEEDS[metric]) for each in (reference, samples))
        if metric in ("fid", "sfid"):
            values[metric] = frechet_distance(real, generated)
        elif metric == "kid":
            subsets, size = eval_config.kid_subsets, eval_config.kid_subset_size
            kid = kernel_distance(real, generated, subsets=subsets, size=size, seed=eval_config.seed)
            values |= {"kid": kid.mean, "kid_deviation": kid.std}
        elif metric == "is":
            score = inception_score(generated, splits=eval_config.splits)
            values |= {"inception_score": score.mean, "inception_score_deviation": score.std}
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
        settings = [sampler_text(how), steps, f"sigma {levels}", guidance_text(how), f"seed {how['seed']}"]
        samples += f" ({', '.join(filter(None, settings))})"
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


def check(extractor: FeatureExtractor, samples: ImageSet, reference: Reference, eval_config: EvalConfig) -> None:
    """Raise InputError if the metrics cannot be computed from these sets."""
    if "is" in eval_config.metrics and "logits" not in extractor.params:
        summarize(extractor, [], ["logits"])
    for metric in eval_config.metrics:
        minimum = eval_config.splits if metric == "is" else _NEIGHBORS.get(metric, 1) + 1
        for images in (samples,) if metric == "is" else (samples, reference):
            if isinstance(images, ImageSet) and images.count < minimum:
                raise InputError(f"{metric} needs at least {minimum} images; {images.name} has {images.count}.")
            if isinstance(images, FeatureStatistics) and getattr(images, NEEDS[metric]) is None:
                needed = {"fid": "mu and sigma", "sfid": "mu_s and sigma_s"}.get(metric, "images")
                raise InputError(f"{metric} needs {needed} of the reference, which {images.name} does not have.")
    if isinstance(reference, FeatureStatistics) and reference.count is None:  # from a file
        for need in {NEEDS[metric] for metric in eval_config.metrics} & {"pool", "spatial"}:
            found, expected = getattr(reference, need).mean.size, extractor.count(need, samples.shape)
            if found != expected:
                raise InputError(
                    f"{reference.name} has statistics of {found} features, expected {expected} of {extractor.name}. "
                    f"Compute them with all features (pytorch-fid: --dims {expected}), or give the images themselves."
                )
    if {"pr", "prdc"} <= set(eval_config.metrics):
        raise InputError("pr and prdc both give precision and recall, with 3 and 5 neighbors: choose one of them.")
    for images in (samples, reference):
        if isinstance(images, ImageSet) and images.shape[2] not in (1, 3):
            problem = f"{images.name} has images of {images.shape[2]} channels"
            raise InputError(f"{problem}, and {extractor.name} takes RGB or gray images: evaluate those channels only.")
    if isinstance(reference, ImageSet) and reference.shape[:2] != samples.shape[:2]:
        sizes = [" x ".join(map(str, each.shape[:2])) for each in (samples, reference)]
        raise InputError(
            f"{samples.name} has images of {sizes[0]} pixels, {reference.name} of {sizes[1]}. Resize one of them with "
            "care: resizing changes FID by more than models differ."
        )
