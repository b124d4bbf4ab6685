"""Samples against a reference: which metrics, by which eval_config, and the report."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm_jax.errors import InputError, check_int, nearest
from cm_jax.evaluation.feature_extractor import FeatureExtractor, FeatureStatistics, summarize
from cm_jax.evaluation.image_sets import ImageSet, Watch, unwatched
from cm_jax.evaluation.metrics import Estimate, frechet_distance, inception_score, kernel_distance
from cm_jax.evaluation.precision_recall import overlap
from cm_jax.evaluation.references import summarised
from cm_jax.evaluation.report import Report
from cm_jax.feature_networks.inception_v3 import CHANNELS

NEEDS = {
    "fid": ("pool",),
    "sfid": ("spatial",),
    "kid": ("features",),
    "is": ("logits",),
    "pr": ("features",),
    "prdc": ("features",),
}
"""Of each metric, the fields of Summary that it is computed from."""

_NEIGHBOURS = {"pr": 3, "prdc": 5}
_TITLES = {"fid": "FID", "sfid": "sFID", "kid": "KID", "inception_score": "IS"}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Which metrics, and what they leave open. The defaults are those of the papers that introduced them."""

    metrics: tuple[str, ...] = ("fid",)
    """fid, sfid, kid, is, pr (improved precision and recall), prdc (with density and coverage)."""
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0
    """Of KID's subsets."""
    splits: int = 10
    """Of the Inception score."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in NEEDS:
                raise InputError(f"There is no metric {metric!r}: {', '.join(NEEDS)}.{nearest(metric, NEEDS)}")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"Name one metric or several, each once; got {','.join(self.metrics) or 'none'}.")
        check_int("kid_subsets", self.kid_subsets, 1, 10**6)
        check_int("kid_subset_size", self.kid_subset_size, 2, 10**6)
        check_int("splits", self.splits, 1, 10**6)
        check_int("The seed", self.seed, 0, 2**32 - 1)

    @property
    def needs(self) -> tuple[str, ...]:
        """What both sets must be summed up for."""
        return tuple(dict.fromkeys(need for metric in self.metrics for need in NEEDS[metric]))

    @property
    def reference_needs(self) -> tuple[str, ...]:
        """What the reference must be summed up for."""
        return tuple(need for need in self.needs if need != "logits")

    def least(self, metric: str) -> int:
        """The smallest set that a metric is defined for."""
        if metric == "is":
            return self.splits
        return _NEIGHBOURS[metric] + 1 if metric in _NEIGHBOURS else 2


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
    """The report, and the reference's statistics, which are kept in the folder `cache` where it is given.

    reference: images, or the statistics of a file (only FID and sFID then). Raises InputError, before anything is drawn
    or seen, for sets that are too small or of different sizes, and for statistics that lack what a metric needs.
    """
    check(extractor, samples, reference, eval_config, reference_name)
    if isinstance(reference, ImageSet):
        reference_name, needs = reference_name or reference.name, eval_config.reference_needs
        known = summarised(extractor, reference, needs, cache=cache, batch_size=batch_size, watch=watch)
    else:
        known = reference
    seen = summarize(extractor, watch(samples.batches(), samples.count), eval_config.needs, batch_size=batch_size)
    values = compare(seen, known, eval_config)
    told: dict[str, Any] = {
        "count": seen.count,
        "samples": samples.name,
        "sampling": samples.how,
        "reference": reference_name,
        "reference_count": known.count,
        "size": list(samples.shape),
        "resize": extractor.resize,
        "features": extractor.name + ("" if extractor.published else ", weights that are NOT those published"),
        "weights_sha256": extractor.digest,
    }
    if "kid" in eval_config.metrics:
        told |= {"kid_subsets": eval_config.kid_subsets, "kid_seed": eval_config.seed}
        told["kid_subset_size"] = min(eval_config.kid_subset_size, seen.count or 0, known.count or 0)
    if "is" in eval_config.metrics:
        told["splits"] = eval_config.splits
    told |= {f"{metric}_neighbours": k for metric, k in _NEIGHBOURS.items() if metric in eval_config.metrics}
    return Report(values, told, _line(values, told)), known


def compare(samples: FeatureStatistics, reference: FeatureStatistics, eval_config: EvalConfig) -> dict[str, float]:
    """The metrics of images that were seen already, by name, with "_deviation" behind it for the spread of an estimate.

    Both must be summed up for what the metrics need (`EvalConfig.needs`).
    """
    values: dict[str, float] = {}
    for metric in eval_config.metrics:
        values |= _measured(metric, samples, reference, eval_config)
    return values


def _measured(
    metric: str, seen: FeatureStatistics, known: FeatureStatistics, eval_config: EvalConfig
) -> dict[str, float]:
    if metric in ("fid", "sfid"):
        use = NEEDS[metric][0]
        return {metric: frechet_distance(getattr(known, use), getattr(seen, use))}
    if metric == "is":
        assert seen.logits is not None
        return _spread("inception_score", inception_score(seen.logits, splits=eval_config.splits))
    assert seen.features is not None
    assert known.features is not None
    if metric == "kid":
        size, subsets = eval_config.kid_subset_size, eval_config.kid_subsets
        return _spread(
            "kid", kernel_distance(known.features, seen.features, subsets=subsets, size=size, seed=eval_config.seed)
        )
    found = overlap(known.features, seen.features, _NEIGHBOURS[metric])._asdict()
    return {name: found[name] for name in (("precision", "recall") if metric == "pr" else found)}


def _line(values: dict[str, float], told: dict[str, Any]) -> str:
    """Numbers and eval_config, to paste into a paper."""
    counted = f"{told['reference_count']:,} of " if told["reference_count"] else ""
    parts = [
        f"N = {told['count']:,} of {told['samples']}{_drawn(told['sampling'])} against {counted}{told['reference']}",
        f"{told['size'][0]} x {told['size'][1]} pixels in 8 bits, {told['resize']}",
        told["features"],
    ]
    if "kid" in values:
        parts.append(f"KID of {told['kid_subsets']} subsets of {told['kid_subset_size']:,}")
    if ("fid" in values or "sfid" in values) and told["count"] < CHANNELS:
        parts.append("FID of so few images is biased upwards: compare at this N only")
    return f"{in_words(values)} [{'; '.join(parts)}]"


def in_words(values: Mapping[str, float]) -> str:
    """FID 12.3, KID 0.0123 ± 0.0012."""
    shown = []
    for name, value in values.items():
        if not name.endswith("_deviation"):
            spread = values.get(f"{name}_deviation")
            shown.append(f"{_TITLES.get(name, name)} {value:.4g}" + (f" ± {spread:.2g}" if spread is not None else ""))
    return ", ".join(shown)


def _drawn(how: dict[str, Any]) -> str:
    """How a model drew; nothing for images that were there."""
    if not how:
        return ""
    levels = ", ".join(f"{sigma:.4g}" for sigma in how["sigmas"][:4]) + (", ..." if how["steps"] > 4 else "")
    steps = f"{how['steps']} step{'s' if how['steps'] > 1 else ''}"
    return f" ({how['sampler']}, {steps}, sigma {levels}, seed {how['seed']})"


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_deviation": estimate.std}


def check(
    extractor: FeatureExtractor,
    samples: ImageSet,
    reference: ImageSet | FeatureStatistics,
    eval_config: EvalConfig,
    name: str,
) -> None:
    """Raise InputError for what the metrics cannot be computed from."""
    if "is" in eval_config.metrics and not extractor.has_logits:
        summarize(extractor, [], ["logits"])
    for metric in eval_config.metrics:
        least = eval_config.least(metric)
        if samples.count < least:
            raise InputError(f"{metric} needs {least} images at least, and {samples.name} has {samples.count}.")
        if metric != "is" and isinstance(reference, ImageSet) and reference.count < least:
            raise InputError(f"{metric} needs {least} images at least, and {reference.name} has {reference.count}.")
        if isinstance(reference, FeatureStatistics):
            lacking = [need for need in NEEDS[metric] if need != "logits" and getattr(reference, need) is None]
            if lacking:
                wanted = "mu_s and sigma_s" if metric == "sfid" else "mu and sigma" if metric == "fid" else "images"
                raise InputError(f"{metric} needs {wanted} of the reference, which {name or 'the file'} does not have.")
    if {"pr", "prdc"} <= set(eval_config.metrics):
        raise InputError("pr and prdc both give precision and recall, by 3 and by 5 neighbours: ask for one of them.")
    if isinstance(reference, ImageSet) and reference.shape[:2] != samples.shape[:2]:
        sizes = [" x ".join(map(str, each.shape[:2])) for each in (samples, reference)]
        raise InputError(
            f"{samples.name} has images of {sizes[0]} pixels and {reference.name} of {sizes[1]}: bring both to one "
            "size, because resizing moves FID by more than models differ."
        )
