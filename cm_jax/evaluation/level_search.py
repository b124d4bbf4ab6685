"""Search for the noise levels of multistep sampling: greedy ternary search by FID (CM, section 6)."""

from collections.abc import Callable
from typing import NamedTuple

from cm_jax.errors import InputError, check_int
from cm_jax.evaluation.evaluate import evaluate
from cm_jax.evaluation.features import FeatureExtractor, Reference
from cm_jax.evaluation.image_sets import ImageSet, of_model
from cm_jax.model import Model

Timesteps = tuple[int, ...]
"""Schedule indices in decreasing order; the last is 0, the noisiest level (as in diffusers)."""


class SearchResult(NamedTuple):
    """The best timesteps, their score, and all scores computed."""

    timesteps: Timesteps
    score: float
    probes: dict[Timesteps, float]


def search_levels(score: Callable[[Timesteps], float], levels: int, steps: int) -> SearchResult:
    """Timesteps with the lowest score, found one by one from the noisiest, each by ternary search.

    Exact if the score is unimodal; otherwise the best of the probed timesteps. No timesteps are probed twice. Raises
    InputError unless 2 <= steps < num_levels.
    """
    check_int(f"The number of steps (of {levels} levels)", steps, 2, levels - 1)
    probes: dict[Timesteps, float] = {}

    def probe(timesteps: Timesteps) -> float:
        if timesteps not in probes:
            probes[timesteps] = score(timesteps)
        return probes[timesteps]

    chosen: Timesteps = (0,)
    while len(chosen) < steps:
        low, high = chosen[0] + 1, levels - 1 - (steps - len(chosen))  # leaves room for the later ones
        while high - low > 2:
            third = (high - low) // 3
            left, right = low + third, high - third
            if probe((left, *chosen)) <= probe((right, *chosen)):
                high = right
            else:
                low = left
        for index in range(low, high + 1):
            probe((index, *chosen))
        chosen = min((each for each in probes if each[1:] == chosen), key=probe)
    return SearchResult(chosen, probes[chosen], probes)


def tune(
    extractor: FeatureExtractor,
    model: Model,
    reference: ImageSet,
    *,
    steps: int = 2,
    count: int = 10_000,
    seed: int = 0,
    guidance: float | None = None,
    on_probe: Callable[[Timesteps, float], None] = lambda timesteps, score: None,
) -> SearchResult:
    """`search_levels` by FID of `count` images, with the same seed in every probe; calls `on_probe` after each.

    guidance: strength, for a model that takes it as an input. Raises InputError for a denoiser and for a reference of
    another image size.
    """
    if not model.config.distilled:
        raise InputError("Expected a consistency model, got a denoiser: only consistency models have tuned timesteps.")
    known: Reference = reference

    def score(timesteps: Timesteps) -> float:
        nonlocal known
        plan = model.plan(timesteps=timesteps, guidance=guidance)
        samples = of_model(model, plan, count, seed=seed, batch_size=extractor.batch_size)
        report, known = evaluate(extractor, samples, known)
        on_probe(timesteps, report.values["fid"])
        return report.values["fid"]

    return search_levels(score, model.config.num_levels, steps)
