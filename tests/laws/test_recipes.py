"""The commands and settings in docs/recipes.md, and the commands in docs/training.md, are valid for the presets."""

import re
import shlex

import pytest

from cm_jax.cli.parsing import parse_preset
from cm_jax.cli.train import Options
from cm_jax.errors import InputError
from cm_jax.presets import PRESETS
from tests.support import ROOT

TEXT, TRAINING = (
    (ROOT / "docs" / name).read_text("utf-8").replace("\\\n", "") for name in ("recipes.md", "training.md")
)
COMMAND = re.compile(r"^python train\.py (.+)$", re.MULTILINE)
SHORTER_RUNS = COMMAND.findall(TEXT.partition("## Shorter runs")[2].partition("\n## ")[0])
SETTINGS = sorted(set(re.findall(r"`(--[a-z][^`]*) ?`", TEXT)) - {"--images", "--batch-size", "--network", "--count"})
SAMPLING_OPTIONS = {"--sigmas 80,0.8"}
"""Options of sample.py, not of train.py."""


def parse_settings(words):
    """The settings that train.py uses for a command line."""
    return parse_preset(PRESETS, Options(), "train.py", words)[1]


@pytest.mark.parametrize("command", COMMAND.findall(TEXT + TRAINING))
def test_commands_are_valid(command):
    if (words := shlex.split(command, comments=True)) != ["--help"]:
        assert parse_settings(words).batches == 2_400 or command not in SHORTER_RUNS


def test_curricula_of_shorter_runs_end_with_the_run():
    assert len(SHORTER_RUNS) == 8
    for words in map(shlex.split, SHORTER_RUNS):
        settings = parse_settings(words)
        objective = settings.objective
        curriculum, gap, warm_up = (getattr(objective, name, None) for name in ("curriculum", "gap", "warm_up"))
        assert getattr(curriculum, "steps", settings.batches) == settings.batches
        assert gap is None or gap.steps_per_stage * gap.stages == settings.batches
        assert warm_up is None or warm_up.steps == settings.batches // 10


@pytest.mark.parametrize("setting", [each for each in SETTINGS if each not in SAMPLING_OPTIONS])
def test_settings_are_valid_for_a_preset(setting):
    accepted = 0
    for preset in PRESETS:
        if preset.startswith("emoji32"):
            try:
                parse_settings([preset, *setting.split()])
                accepted += 1
            except InputError:
                pass
    assert accepted
