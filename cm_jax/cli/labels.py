"""The option --labels."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from cm_jax.checkpoints.class_labels import find_classes, index_note, is_index, split_labels
from cm_jax.cli.running import say
from cm_jax.errors import InputError

LabelTexts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CLASS,...")]
"""Values of --labels, which may be given several times."""


def read_labels(texts: Sequence[str], names: tuple[str, ...]) -> list[Any]:
    """The labels of all --labels: each a comma-separated or JSON list of indices and names. `names`: class names.

    Prints which one is meant where a number is the index of one class and the name of another.
    """
    labels = [label for text in texts if text for label in _listed(text, names)]
    return [_told(label, names) if isinstance(label, str) and is_index(label) else label for label in labels]


def _told(label: str, names: tuple[str, ...]) -> int | str:
    """A number as an index, after printing that it is one if it is also the name of another class."""
    if not (note := index_note(label, names)):
        return label
    say(note)
    return int(label)


def _listed(text: str, names: tuple[str, ...]) -> list[Any]:
    if not text.lstrip().startswith("[") or find_classes(text, names):
        return [*split_labels(text, names)]
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'--labels {text}: expected a JSON list such as ["king penguin", 145]; {error}.') from error
    if not labels:
        raise InputError("--labels []: expected at least one class.")
    return labels
