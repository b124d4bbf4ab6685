"""Class labels as users write them: indices, names, synonyms, and lists of them.

A class name may hold several names, "tench, Tinca tinca". The whole name, each of its synonyms, and several synonyms
in a row name the class.
"""

import difflib
import functools
import itertools
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from cm_jax.arguments import as_list
from cm_jax.errors import InputError, check_int, one_line

ClassLabels = int | str | Sequence[int | str] | Integer[Array | np.ndarray, "*labels"]
"""Labels as users write them: indices or names, one for all images or one per image."""

_log = logging.getLogger("cm_jax.labels")


def class_numbers(labels: ClassLabels, count: int, classes: int, names: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """Class indices for `count` images. Raises InputError for unknown and ambiguous labels, and for a wrong number."""
    listed = None if isinstance(labels, str) else as_list(labels)
    given = [labels] if listed is None else listed
    if len(given) not in (1, count):
        raise InputError(f"Expected one label or {count}, one for each image; got {len(given)} labels.")
    numbers = [_class_number(label, classes, names) for label in given]
    return np.asarray(numbers * (count // len(numbers)), np.int32)


def traced_numbers(labels: Integer[Array, "*labels"], count: int) -> Int[Array, " n"]:
    """Traced class indices for `count` images, of which only type and shape can be checked."""
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape not in ((), (1,), (count,)):
        raise InputError(f"Expected integers [] or [{count}] as labels, got {labels.dtype} {list(labels.shape)}.")
    return jnp.broadcast_to(labels.astype(jnp.int32), (count,))


def split_labels(text: str, names: tuple[str, ...]) -> list[str]:
    """The labels in a comma-separated list, in which class names may have commas themselves.

    The longest run of parts that is a class name, or several of its synonyms, is one label. Raises InputError where
    some synonyms of one class are also names of others: "ruffed grouse, partridge" is one class or two.
    """
    parts, index, labels = [part.strip() for part in text.split(",")], _index(names), []
    while parts:
        runs = [parts[:stop] for stop in range(min(len(parts), index.longest), 1, -1)]
        run = next((run for run in runs if index.is_run(run)), parts[:1])
        label = ", ".join(run)
        if len(run) > 1 and not index.whole.get(_folded(label)):
            _check_run(label, run, names)
        labels.append(label)
        parts = parts[len(run) :]
    return labels


def find_classes(label: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """Indices of the classes that a name may mean; several if it is ambiguous.

    A whole name in the same case is preferred to a whole name in another case or a synonym in the same case, and these
    to a synonym in another case: "harp" is the class of this name, not the harmonica.
    """
    index, plain, folded = _index(names), _plain(label), _folded(label)
    same_case = index.exact.get(plain, ()), index.synonyms.get(plain, ())
    any_case = index.whole.get(folded, ()), index.runs.get(folded, ())
    tiers = same_case[0], any_case[0] + same_case[1], any_case[1]
    return tuple(sorted(set(next(filter(None, tiers), ()))))


def index_note(label: str, names: tuple[str, ...]) -> str:
    """A sentence for a number that is the index of one class and the name of another; else an empty string."""
    number, named = int(label), _named_by_number(label, names)
    if not named or number in named or not 0 <= number < len(names):
        return ""
    return (
        f"Label {label} was taken as an index: class {names[number]!r}. "
        f"The class named {names[named[0]]!r} has index {named[0]}."
    )


def described_classes(names: tuple[str, ...]) -> str:
    """Numbers and names of the classes, "0 cat; 1 dog"; of more than 12 classes the first three and the last."""
    listed = [f"{number} {name.split(', ')[0]}" for number, name in enumerate(names)]
    return "; ".join(listed if len(listed) <= 12 else [*listed[:3], "...", listed[-1]])


def is_index(label: str) -> bool:
    """Whether a label is the text of a whole number, which always means an index."""
    return re.fullmatch(r"[+-]?[0-9]{1,9}", label) is not None


class _Index(NamedTuple):
    """Names -> indices of the classes that have them."""

    exact: dict[str, tuple[int, ...]]
    """By the whole name."""
    whole: dict[str, tuple[int, ...]]
    """By the whole name in any case."""
    synonyms: dict[str, tuple[int, ...]]
    """By one synonym or several in a row."""
    runs: dict[str, tuple[int, ...]]
    """The same in any case."""
    longest: int
    """Largest number of parts between commas in a name."""

    def is_run(self, parts: Sequence[str]) -> bool:
        folded = _folded(", ".join(parts))
        return folded in self.whole or folded in self.runs


@functools.lru_cache(maxsize=8)
def _index(names: tuple[str, ...]) -> _Index:
    exact, whole, synonyms, runs = ({} for _ in range(4))
    for number, name in enumerate(names):
        words = name.split(", ")
        ends = itertools.combinations(range(len(words) + 1), 2)
        parts = {", ".join(words[first:stop]) for first, stop in ends} if len(words) > 1 else ()
        for table, keys in [
            (exact, {_plain(name)}),
            (whole, {_folded(name)}),
            (synonyms, {_plain(part) for part in parts}),
            (runs, {_folded(part) for part in parts}),
        ]:
            for key in keys:
                table[key] = (*table.get(key, ()), number)
    return _Index(exact, whole, synonyms, runs, max((name.count(",") + 1 for name in names), default=1))


def _plain(name: str) -> str:
    """A name with uniform spaces and commas, in composed Unicode."""
    return unicodedata.normalize("NFC", re.sub(r"\s*,\s*", ", ", " ".join(name.split())))


def _folded(name: str) -> str:
    return _plain(name).casefold()


def _class_number(label: Any, classes: int, names: tuple[str, ...]) -> int:
    if not isinstance(label, str):
        return check_int("A label", label, 0, classes - 1)
    label = label.strip()
    if is_index(label):
        return _checked_index(label, classes, names)
    found = find_classes(label, names)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"Several classes are named {label!r}; use one of the numbers {_choices(found, names)}.")
    words = [word for name in names for word in [name, *name.split(", ")]]
    close = difflib.get_close_matches(label, words, n=1, cutoff=0.5)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif names:
        hint = f"its classes are {described_classes(names)}."
    else:
        hint = f"its classes have no names; use a number from 0 to {classes - 1}."
    raise InputError(f"This model has no class {one_line(label, 200)}: {hint}")


def _checked_index(label: str, classes: int, names: tuple[str, ...]) -> int:
    number = int(label)
    if not 0 <= number < classes:
        named = _named_by_number(label, names)
        advice = f" The class named {names[named[0]]!r} has index {named[0]}." if named else ""
        raise InputError(f"A label must be a whole number from 0 to {classes - 1}, got {label}.{advice}")
    if note := index_note(label, names):
        _log.warning("%s", note)
    return number


def _named_by_number(label: str, names: Sequence[str]) -> list[int]:
    """Indices of the classes whose name is this number."""
    return [i for i, name in enumerate(names) if re.fullmatch("[0-9]{1,18}", name) and int(name) == int(label)]


def _check_run(label: str, parts: Sequence[str], names: tuple[str, ...]) -> None:
    """Raise InputError if some synonyms of a class are the names of others, too."""
    apart = [find_classes(part, names) for part in parts]
    together = find_classes(label, names)
    if all(len(found) == 1 for found in apart) and set(together) != set(itertools.chain(*apart)):
        several = _choices([found[0] for found in apart], names)
        raise InputError(
            f"{label!r} may be the class {_choices(together, names)} or the classes {several}: use the numbers, or one "
            "--labels for each class."
        )


def _choices(numbers: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(f"{number} ({names[number]})" for number in dict.fromkeys(numbers))
