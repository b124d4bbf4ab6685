"""Schedules against the length of a run: too long, too short, too slow, or still to be extended."""

import bisect
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from cm_jax.diffusion.curricula import Curriculum, StepSchedule, TargetEMA
from cm_jax.errors import InputError
from cm_jax.training.config import TrainConfig
from cm_jax.training.optimizers import LearningRate

NEW_RUN = "start a new run from these weights (--init-from THIS_RUN, another --run)"
"""Advice for a schedule that has ended."""


def unfinished_schedules(config: TrainConfig) -> Iterator[str]:
    """A warning for every curriculum and learning rate that is longer than the run."""
    for place, schedule in _schedules(config):
        if schedule.duration > config.batches:
            yield (
                f"{_flag(place)} takes {schedule.duration:,} steps, but the run has {config.batches:,}. "
                f"Change {_flag(place, schedule)} or raise --images."
            )


def outrun_schedules(config: TrainConfig, before: TrainConfig | None = None, done: int = 0) -> Iterator[str]:
    """A warning for every schedule that ends before the run does and was not meant to.

    These are learning rates that decay to zero and, where a run with the settings `before` is continued after `done`
    batches with more images, all schedules that spanned at least half of it.
    """
    former = before.batches if before is not None else config.batches
    for place, schedule in _schedules(config):
        is_rate = isinstance(schedule, LearningRate)
        spanned = former < config.batches and 2 * schedule.duration >= former
        if schedule.duration >= config.batches or not (is_rate or spanned):
            continue
        effect = "the learning rate is 0" if is_rate else "it keeps its last value"
        advice = f"raise {_flag(place, schedule)}" if done < schedule.duration else NEW_RUN
        yield (
            f"{_flag(place)} ends after {schedule.duration:,} steps, but the run has {config.batches:,}: {effect} for "
            f"the rest. To extend it, {advice}."
        )


def crossings(target: TargetEMA, curriculum: Curriculum, steps: int) -> float:
    """How often information crosses all noise levels: steps (1 - mu) / (N - 1), with mu and N of the last step.

    A target of rate mu follows the student after about 1 / (1 - mu) steps, and every pair of adjacent levels carries
    information one level up, from the clean image at the lowest.
    """
    rate = float(target(steps, curriculum))
    return steps * (1 - rate) / max(1, int(curriculum(steps)) - 1)


def slow_target(config: TrainConfig) -> Iterator[str]:
    """A warning if information crosses the noise levels less than once, so that images of one step may stay gray."""
    curriculum = getattr(config.objective, "curriculum", None)
    if config.target_ema is None or not isinstance(curriculum, Curriculum):
        return
    found = crossings(config.target_ema, curriculum, config.batches)
    if found < 1:
        yield (
            f"--target-ema is too slow for the noise levels: in {config.batches:,} steps information crosses them "
            f"{found:.2g} times; below one, images may stay gray. Train for more steps, with fewer noise levels "
            "(--objective.curriculum) or with a faster target."
        )


def check_learning_rate(config: TrainConfig, folder: Path, done: int) -> None:
    """Raise InputError if training after `done` batches would have a learning rate of zero."""
    for place, schedule in _schedules(config):
        if isinstance(schedule, LearningRate) and schedule.duration <= done < config.batches:
            raise InputError(
                f"The learning rate of {folder} is 0 from step {schedule.duration:,} on, so that more images change "
                f"nothing: {_flag(place)} has ended. To train on, {NEW_RUN}."
            )


def continuation(config: TrainConfig) -> str:
    """Advice for continuing a finished run."""
    ended = any(isinstance(each, LearningRate) and each.duration <= config.batches for _, each in _schedules(config))
    return f"Its learning rate has decayed to 0: to train on, {NEW_RUN}." if ended else "Raise --images to continue."


def extensible(config: TrainConfig, done: int) -> set[str]:
    """Fields that may change after `done` batches: the lengths of schedules that have not ended."""
    return {f"{place}.{schedule.LENGTH_FIELD}" for place, schedule in _schedules(config) if done < schedule.duration}


def _flag(place: str, schedule: StepSchedule | None = None) -> str:
    """The option of a component, or of the length of a schedule."""
    return f"--{place}{f'.{schedule.LENGTH_FIELD}' if schedule else ''}".replace("_", "-")


def optimizer_step(config: TrainConfig, step: int) -> int:
    """Steps of the optimizer before `step`, by which the learning rate counts: a new stage of PD restarts it."""
    curriculum = config.objective.curriculum
    if not config.objective.replaces_teacher or curriculum is None:
        return step
    stage = int(curriculum(step))
    return step - bisect.bisect_left(range(step), True, key=lambda earlier: int(curriculum(earlier)) == stage)


def _schedules(config: TrainConfig) -> Iterator[tuple[str, StepSchedule]]:
    """(place, schedule) of all schedules, except for learning rates that restart at every stage."""
    for place, schedule in _nested(config):
        if not (isinstance(schedule, LearningRate) and config.objective.replaces_teacher):
            yield place, schedule


def _nested(config: object, prefix: str = "") -> Iterator[tuple[str, StepSchedule]]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, place = getattr(config, field.name), prefix + field.name
        if isinstance(value, StepSchedule):
            yield place, value
        if dataclasses.is_dataclass(value):
            yield from _nested(value, f"{place}.")
