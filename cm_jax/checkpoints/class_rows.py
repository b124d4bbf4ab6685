"""Class names of two models or data sets: which of them mean the same class."""

import re

from cm_jax.checkpoints.class_labels import find_classes
from cm_jax.checkpoints.published import imagenet_classes

Names = tuple[str, ...]


def class_rows(names: Names, others: Names) -> list[int | None]:
    """For each name the number of the class in `others` that it means; None if there are none or several."""
    names, others = without_ids(names), without_ids(others)
    if names == others:
        return list(range(len(names)))
    found = [find_classes(name, others) for name in names]
    return [numbers[0] if len(numbers) == 1 else None for numbers in found]


def without_ids(names: Names) -> Names:
    """ImageNet's 1,000 WordNet ids, "n01440764", as class names, which are in their order; other names unchanged."""
    ids = sorted({name for name in names if re.fullmatch("n[0-9]{8}", name)})
    if len(ids) != 1000 or len(names) != 1000:
        return names
    numbers = {name: number for number, name in enumerate(ids)}
    return tuple(imagenet_classes()[numbers[name]] for name in names)
