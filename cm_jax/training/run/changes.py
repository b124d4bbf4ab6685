"""Settings that may change when a run resumes, and those that may not.

Every field of TrainConfig has one `Effect`: the entry of EFFECTS for the field itself, or for the nearest component
that holds it.
"""

import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cm_jax.checkpoints import serialization
from cm_jax.errors import InputError, indented_list
from cm_jax.training.config import TrainConfig
from cm_jax.training.schedules import NEW_RUN, extensible


class Effect(enum.Enum):
    """What a changed field changes in the rest of the run."""

    NONE = "nothing"
    ROUNDING = "rounding"
    NUMBERS = "numbers"
    """Needs --allow-config-change, and is recorded."""
    MODEL = "model"
    """What the parameters mean: cannot change."""


EFFECTS: Mapping[str, Effect] = {
    name: effect
    for effect, names in {
        Effect.NONE: (
            *("images", "image_offset", "max_consecutive_skips", "log_every", "sample_every", "checkpoint_every"),
            *("keep_last", "keep_every", "keep_hours", "evaluation", "inherit_network", "ema_snapshot_every"),
            *("network_fields", "inherit_data"),
            *("data.in_memory_gib", "data.max_corrupt", "data.workers"),
        ),
        Effect.ROUNDING: (
            *("steps_per_dispatch", "parallel", "shards", "grad_accum_steps"),
            *("network.attention", "network.rematerialize"),
        ),
        Effect.NUMBERS: (
            *("data", "objective.*", "optimizer", "target_ema", "schedule", "num_levels", "teacher", "batch_size"),
            *("teacher_key", "teacher_ema", "ema_decay", "power_ema", "flip", "augmentation", "label_dropout", "seed"),
            *("network.dropout", "network.dropout_size", "network.precision"),
        ),
        Effect.MODEL: ("network", "preconditioning", "objective", "init_from", "init_from_key", "init_from_ema"),
    }.items()
    for name in names
}
"""Effect of a field and of the fields in it; "objective.*" is the fields of the objective without its kind."""
SAMPLED_EMA = "evaluation.ema"
"""Place of the EMA to sample from, which also depends on the list of EMAs."""
CONTENT = "data content"
"""Place of the content hash of the data."""
TEACHER = "teacher parameters"
"""Place of the digest of the teacher's parameters."""


def effect_of(place: str) -> Effect:
    """Effect of a field such as "optimizer.learning_rate.peak"."""
    parts = place.split(".")
    heads = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    names = [heads[0], *(name for head in heads[1:] for name in (f"{head}.*", head))]
    return next(EFFECTS[name] for name in names if name in EFFECTS)


class Settings(NamedTuple):
    """What a run computes from."""

    config: TrainConfig
    content: str | None
    """Content hash of the data; None if it is not known."""
    teacher: str | None = None
    """Digest of the teacher's parameters; None without a teacher or if it is not known."""


class Change(NamedTuple):
    place: str
    old: Any
    """A JSON value, as is `new`."""
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.place}: {serialization.in_words(self.old)} -> {serialization.in_words(self.new)}"


def changes(before: Settings, now: Settings) -> Iterator[Change]:
    """All fields that differ, and the content of the data and the teacher. Another path of the same has no effect."""
    known = None not in (before.content, now.content)
    old, new = serialization.encode(before.config), serialization.encode(now.config)
    for place, values in serialization.changed_values(old, new).items():
        data = known and before.content == now.content and place.partition(".")[0] == "data"
        teacher = before.teacher is not None and before.teacher == now.teacher and place.startswith("teacher")
        yield Change(place, *values, Effect.NONE if data or teacher else effect_of(place))
    if known and before.content != now.content:
        yield Change(CONTENT, before.content, now.content, Effect.NUMBERS)
    if None not in (before.teacher, now.teacher) and before.teacher != now.teacher:
        yield Change(TEACHER, before.teacher, now.teacher, Effect.NUMBERS)
    sampled = before.config.sampled_ema, now.config.sampled_ema
    if sampled[0] != sampled[1]:
        yield Change(SAMPLED_EMA, *sampled, Effect.NUMBERS)


def check_changes(folder: Path, before: Settings, now: Settings, done: int, allowed: bool) -> list[str]:
    """Notes about the changes of a run that resumes after about `done` batches.

    Raises InputError for changes that are not possible, and for those that need permission unless `allowed`. The length
    of a schedule that has not ended may always change.
    """
    found = list(changes(before, now))
    free = extensible(before.config, done)
    refused = [each for each in found if each.effect is Effect.MODEL]
    asked = [each for each in found if each.effect is Effect.NUMBERS and each.place not in free and not allowed]
    if refused or asked:
        pairs = ((each.place, *map(serialization.in_words, (each.old, each.new))) for each in (*refused, *asked))
        flag = "" if refused else ", or --allow-config-change to continue with the new ones"
        advice = f"Give the same settings or another folder{flag}."
        if ended := {each.place for each in asked} & extensible(before.config, 0):
            advice += f" The schedule of {', '.join(sorted(ended))} has ended: to train on, {NEW_RUN}."
        if refused:
            advice += f" {', '.join(each.place for each in refused)} cannot change in a run: {NEW_RUN}."
        lines = [f"{place}: {old} in the folder, {new} now" for place, old, new in pairs]
        raise InputError(f"{folder} holds a run with other settings:\n  {indented_list(lines)}\n{advice}")
    moved = [str(each) for each in found if each.effect is Effect.NONE is not effect_of(each.place)]
    rounded = [str(each) for each in found if each.effect is Effect.ROUNDING]
    return [
        *(f"Changed, with the same content: {line}." for line in moved),
        *(f"Changed, with the same results up to rounding: {line}." for line in rounded),
    ]
