"""The class indices of a run, its teacher and its initial weights, compared by class names."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np

from cm_jax.checkpoints.class_rows import Names, class_rows, without_ids
from cm_jax.data import Dataset
from cm_jax.errors import InputError

_log = logging.getLogger(__name__)


def in_class_order(dataset: Dataset, class_names: Names, source: str) -> Dataset:
    """The data set with its classes numbered as in `class_names`; itself if they are or if either has no names.

    Raises InputError if the names differ other than in their order. `source`: what has these names, for messages.
    """
    names, others = without_ids(dataset.class_names), without_ids(class_names)
    if not names or not others or names == others:
        return dataset
    rows = class_rows(names, others)
    order = [row for row in rows if row is not None]
    if not same_classes(names, others):
        lacking = [name for name, row in zip(names, rows, strict=True) if row is None]
        unused = [name for number, name in enumerate(others) if number not in order]
        raise InputError(
            f"The class names of the data differ from those of {source}. Only in the data: {_listed(lacking)}. Only in "
            f"the other: {_listed(unused)}. Rename the classes of the data (their folders), or use another checkpoint."
        )
    if order == list(range(len(others))):
        return dataset
    return dataset.renumbered(np.asarray(order, np.int32), class_names, f"as in {source}")


def same_classes(names: Names, others: Names) -> bool:
    """Whether both name the same classes, in any order."""
    rows = class_rows(names, others)
    return None not in rows and sorted(row for row in rows if row is not None) == list(range(len(others)))


def in_order_of_all(dataset: Dataset, sources: Iterable[tuple[str, Names]]) -> Dataset:
    """The data set with its classes numbered as in all `sources` (source, class names).

    Raises InputError if two sources number the classes differently, or as `in_class_order`.
    """
    first = ""
    for source, names in sources:
        ordered = in_class_order(dataset, names, source)
        if first and ordered is not dataset:
            raise InputError(f"{first} and {source} number the same classes differently; use only one of them.")
        if names and dataset.class_names:
            first = first or source
        dataset = ordered
    return dataset


def in_order_of_run(dataset: Dataset, class_names: Names, sources: Iterable[tuple[str, Names]]) -> Dataset:
    """The data set with its classes numbered as in the run that is resumed.

    Warns if the `sources` number them differently, which runs of earlier versions did not check.
    """
    ordered = in_class_order(dataset, class_names, "the run's checkpoints")
    for source, names in sources:
        try:
            same = in_class_order(ordered, names, source) is ordered
        except InputError:
            same = False
        if not same:
            _log.warning("The run numbers its classes differently from %s: start a new run.", source)
    return ordered


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
