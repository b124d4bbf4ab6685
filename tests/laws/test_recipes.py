"""The commands and settings in docs/recipes.md are valid for the presets."""

import re
import shlex

import pytest

from cm_jax.cli.overrides import parse
from cm_jax.cli.train import Options
from cm_jax.errors import InputError
from cm_jax.presets import PRESETS
from tests.support import ROOT

TEXT = (ROOT / "docs" / "recipes.md").read_text("utf-8").replace("\\\n", "")
COMMAND = re.compile(r"^python train\.py (.+)$", re.MULTILINE)
SHORTER = COMMAND.findall(TEXT.partition("## Shorter runs")[2])
SETTINGS = sorted(set(re.findall(r"`(--[a-z][^`]*) ?`", TEXT)) - {"--images", "--batch-size", "--network", "--count"})
OTHERS = {"--sigmas 80,0.8"}
"""Options of sample.py."""


def settings_of(words):
    return parse(PRESETS, Options(), "train.py", words)[1]


@pytest.mark.parametrize("command", COMMAND.findall(TEXT))
def test_commands_are_valid(command):
    assert settings_of(shlex.split(command)).batches == 10_000 or command not in SHORTER


def test_curricula_end_with_the_run():
    assert len(SHORTER) == 8
    for words in map(shlex.split, SHORTER):
        chosen = settings_of(words)
        objective = chosen.objective
        curriculum, gap, warm_up = (getattr(objective, name, None) for name in ("curriculum", "gap", "warm_up"))
        assert getattr(curriculum, "steps", chosen.batches) == chosen.batches
        assert gap is None or gap.steps_per_stage * gap.stages == chosen.batches
        assert warm_up is None or warm_up.steps == chosen.batches // 10


@pytest.mark.parametrize("setting", [each for each in SETTINGS if each not in OTHERS])
def test_settings_are_valid(setting):
    accepted = 0
    for preset in PRESETS:
        if preset.startswith("emoji32"):
            try:
                settings_of([preset, *setting.split()])
                accepted += 1
            except InputError:
                pass
    assert accepted
