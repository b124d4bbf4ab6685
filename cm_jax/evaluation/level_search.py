"""At which levels a consistency model is best called: the greedy ternary search of the paper (CM, section 6)."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cm_jax.errors import InputError, check_int
from cm_jax.evaluation.evaluate import evaluate
from cm_jax.evaluation.feature_extractor import FeatureExtractor
from cm_jax.evaluation.image_sets import ImageSet, Watch, of_model, unwatched
from cm_jax.evaluation.references import summarised
from cm_jax.model import Model

Timesteps = tuple[int, ...]
"""Grid indices as diffusers writes them, falling to 0, the noisiest level."""


class Found(NamedTuple):
    """The best timesteps, their score, and every score on the way."""

    timesteps: Timesteps
    score: float
    probes: dict[Timesteps, float]


def search_levels(score: Callable[[Timesteps], float], levels: int, steps: int) -> Found:
    """The timesteps with the lowest score, found one after the other from the noisiest on, each by ternary search.

    Exact where the score has one valley; elsewhere the best of what was probed. Nothing is probed twice. Raises
    InputError where a grid of `levels` has no place for so many steps.
    """
    check_int(f"The number of steps (of {levels} levels)", steps, 2, levels - 1)
    probes: dict[Timesteps, float] = {}

    def probed(timesteps: Timesteps) -> float:
        if timesteps not in probes:
            probes[timesteps] = score(timesteps)
        return probes[timesteps]

    chosen: Timesteps = (0,)
    while len(chosen) < steps:
        low, high = chosen[0] + 1, levels - 1 - (steps - len(chosen))  # later ones still find a place
        while high - low > 2:
            third = (high - low) // 3
            left, right = low + third, high - third
            if probed((left, *chosen)) <= probed((right, *chosen)):
                high = right
            else:
                low = left
        for index in range(low, high + 1):
            probed((index, *chosen))
        chosen = min((each for each in probes if each[1:] == chosen), key=probed)
    return Found(chosen, probes[chosen], probes)


def tune(
    extractor: FeatureExtractor,
    model: Model,
    reference: ImageSet,
    *,
    steps: int = 2,
    count: int = 10_000,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
    watch: Watch = unwatched,
    told: Callable[[Timesteps, float], None] = lambda timesteps, score: None,
) -> Found:
    """`search_levels` by FID of `count` images, of the same seed in every probe. `told` hears of each probe."""
    if not model.config.distilled:
        raise InputError("Levels are tuned for consistency models: a denoiser's sampler has many steps of its own.")
    if reference.shape[:2] != model.config.network.image_shape[:2]:
        raise InputError(f"The model draws images {list(model.config.network.image_shape)}, got {reference.shape}.")
    check_int("The number of images", count, 2, 10**9)
    check_int(f"The number of steps (of {model.config.grid.levels} levels)", steps, 2, model.config.grid.levels - 1)
    known = summarised(extractor, reference, ("pool",), cache=cache, batch_size=batch_size, watch=watch)

    def score(timesteps: Timesteps) -> float:
        samples = of_model(model, model.plan(timesteps=timesteps), count, seed=seed, batch_size=batch_size)
        report, _ = evaluate(extractor, samples, known, batch_size=batch_size, watch=watch)
        told(timesteps, report.values["fid"])
        return report.values["fid"]

    return search_levels(score, model.config.grid.levels, steps)
