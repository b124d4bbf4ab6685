"""RUN/config.json, the settings of a run, and RUN/config_history.json, all settings that it has had.

The history is written when settings that change the numbers are changed for the first time. It lists whole
configurations: number i holds for the batches from its `batches` up to those of number i + 1. So batch k of a changed
run, too, is a pure function of its files and k.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cm_jax.checkpoints import serialization
from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write
from cm_jax.io.validation import read_json
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.changes import Change, Effect, Settings, changes
from cm_jax.training.run.provenance import last_content

FORMAT = 1
"""Version of both files."""
CONFIG, HISTORY = "config.json", "config_history.json"


class Period(NamedTuple):
    """The settings from a number of batches on."""

    batches: int
    settings: Settings
    time: str = ""
    changed: tuple[Change, ...] = ()


class RunHistory(NamedTuple):
    """The periods of a run, ascending. The first begins at batch 0."""

    periods: tuple[Period, ...]

    def at(self, done: int) -> Settings:
        """The settings with which the checkpoint after `done` batches was saved."""
        return [each for each in self.periods if each.batches < done or each is self.periods[0]][-1].settings

    def continued(self, done: int, now: Settings) -> "RunHistory":
        """The history of the run that resumes after `done` batches; what followed them before is left out."""
        before = self.at(done)
        found = tuple(each for each in changes(before, now) if each.effect is Effect.NUMBERS)
        if done == 0:
            return RunHistory((Period(0, now),))
        kept = tuple(each for each in self.periods if each.batches < done)
        if not found:
            return RunHistory(kept)
        return RunHistory((*kept, Period(done, now, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), found)))

    def lines(self, done: int) -> list[str]:
        """What changes at batch `done`, for the user."""
        last = self.periods[-1]
        return [f"{change} from batch {done:,} on." for change in last.changed] if last.batches == done else []

    def write(self, run: Path, config: TrainConfig) -> None:
        """Write both files, in process 0. Raises InputError."""
        if jax.process_index() != 0:
            return
        if len(self.periods) > 1:
            with atomic_write(run / HISTORY) as fresh:
                encoded = {"format": FORMAT, "configurations": [_encoded(period) for period in self.periods]}
                fresh.write_text(json.dumps(encoded, indent=2) + "\n", "utf-8")
        else:
            (run / HISTORY).unlink(missing_ok=True)
        with atomic_write(run / CONFIG) as fresh:
            fresh.write_text(serialization.to_text(config, FORMAT), "utf-8")


def read_config(run: Path) -> TrainConfig | None:
    """The settings in RUN/config.json, if there are some. Raises InputError."""
    file = run / CONFIG
    if not file.exists():
        return None
    try:
        text = file.read_text("utf-8", "replace")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
    return serialization.from_text(text, TrainConfig, FORMAT, str(file), "the config of a run")


def read_history(run: Path) -> tuple[Settings, RunHistory] | None:
    """The settings of the last start, and the history; None for a new run. Raises InputError for damaged files."""
    config, file = read_config(run), run / HISTORY
    if config is None:
        return None
    last = Settings(config, *last_content(run))
    if not file.exists():
        return last, RunHistory((Period(0, last),))
    found = read_json(file)
    try:
        if found["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found['format']!r}")
        periods = tuple(_decoded(each, f"{file}, configuration {i}") for i, each in enumerate(found["configurations"]))
        if not periods or periods[0].batches != 0:
            raise ValueError("it does not begin at batch 0")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error!r}): restore it from a copy, or start in a new folder.") from error
    return last, RunHistory(periods)


def _encoded(period: Period) -> dict[str, Any]:
    config = json.loads(serialization.to_text(period.settings.config, FORMAT))
    changed = {each.place: {"old": each.old, "new": each.new} for each in period.changed}
    first = {"batches": period.batches, "time": period.time, "changes": changed}
    content = {"data": period.settings.content, "teacher": period.settings.teacher}
    return first | content | {"config": config}


def _decoded(found: dict[str, Any], source: str) -> Period:
    config = serialization.from_text(json.dumps(found["config"]), TrainConfig, FORMAT, source, "the config of a run")
    pairs = found["changes"].items()
    changed = tuple(Change(place, pair["old"], pair["new"], Effect.NUMBERS) for place, pair in pairs)
    return Period(int(found["batches"]), Settings(config, found["data"], found.get("teacher")), found["time"], changed)
