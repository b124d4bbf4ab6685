"""Named training runs: the papers' hyper-parameters, and small runs on the bundled emoji.

`PRESETS` maps a name to a function that returns a TrainConfig and whose docstring is the help text. FIDs are those that
the papers report for 50,000 samples, of the student in one and in two steps; they have not been reproduced here.
"""

import inspect
from collections.abc import Callable

from cm_jax.presets import cifar10, emoji16, emoji32, imagenet64, lsun256
from cm_jax.training.config import TrainConfig

PRESETS: dict[str, Callable[[], TrainConfig]] = {
    name.replace("_", "-"): function
    for module in (emoji16, emoji32, cifar10, imagenet64, lsun256)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__
}
