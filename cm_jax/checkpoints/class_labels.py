"""Class labels as users write them: numbers or names, one for all images or one per image."""

import difflib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from cm_jax.errors import InputError, check_int

ClassLabels = int | str | Sequence[int | str] | Int[Array | np.ndarray, " b"]


def class_numbers(
    labels: ClassLabels | None, count: int, classes: int | None, names: Sequence[str]
) -> Int[np.ndarray, " n"] | None:
    """Class numbers for `count` images; None for an unconditional model, whose `classes` is None.

    `names` are those of the classes, or empty. A class with several names, "tench, Tinca tinca", is found by each.
    Raises InputError for unknown and ambiguous labels, for a wrong number of labels, for labels of an unconditional
    model, and for a class-conditional model without labels.
    """
    if classes is None:
        if labels is not None:
            raise InputError("Expected no labels for an unconditional model; leave them out.")
        return None
    if labels is None:
        raise InputError(f"Expected labels in [0, {classes - 1}]: this model is class-conditional.")
    given = [labels] if isinstance(labels, str) else np.ravel(np.asarray(labels)).tolist()
    if len(given) not in (1, count):
        raise InputError(f"Expected one label or {count}, one for each image; got {len(given)} labels.")
    numbers = [_class_number(label, classes, names) for label in given]
    return np.asarray(numbers * (count // len(numbers)), np.int32)


def _class_number(label: int | str | float, classes: int, names: Sequence[str]) -> int:
    if not isinstance(label, str):
        return check_int("A label", label, 0, classes - 1)
    label = label.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,9}", label):
        return check_int("A label", int(label), 0, classes - 1)
    folded = label.casefold()
    exact = [i for i, name in enumerate(names) if folded == name.casefold()]
    found = exact or [i for i, name in enumerate(names) if folded in name.casefold().split(", ")]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{i} ({names[i]})" for i in found)
        raise InputError(f"Several classes are named {label!r}; use one of the numbers {choices}.")
    words = [word for name in names for word in [name, *name.split(", ")]]
    close = difflib.get_close_matches(label, words, n=1, cutoff=0.5)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif names:
        hint = f"its classes are {'; '.join(names[:10])}."
    else:
        hint = f"its classes have no names; use a number from 0 to {classes - 1}."
    raise InputError(f"This model has no class {label!r}: {hint}")
