"""`load`: a model from a checkpoint of any format."""

import dataclasses
from pathlib import Path
from typing import get_args

from cm_jax import conversion
from cm_jax.checkpoints.published import DEFAULT, resolve
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.types import Precision


def load(path_or_name: str | Path = DEFAULT, *, precision: Precision = "float32") -> Model:
    """A model from a checkpoint.

    path_or_name: a native checkpoint, OpenAI's `.pt`, a diffusers folder, a jcm checkpoint, the name of a bundled
    checkpoint, the folder of a training run (its latest checkpoint), or RUN/best (the best of those evaluated).

    precision: computation precision inside the network. float32 is exact on every device; bfloat16 and float16 are
    faster on accelerators and halve the memory. Raises InputError for a missing or damaged checkpoint.
    """
    if precision not in get_args(Precision):
        raise InputError(f"Expected precision {', '.join(get_args(Precision))}, got {precision!r}.")
    source = conversion.read(resolve(path_or_name))
    network = source.config.network.at_precision(precision)
    return Model(dataclasses.replace(source.config, network=network), network.prepare(source.params))
