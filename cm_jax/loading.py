"""`load`: a model from a checkpoint of any format."""

import dataclasses
import logging
from pathlib import Path
from typing import get_args

from cm_jax import conversion
from cm_jax.checkpoints.published import DEFAULT, resolve
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.types import Precision

_log = logging.getLogger(__name__)


def load(
    path_or_name: str | Path = DEFAULT,
    *,
    precision: Precision = "float32",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    download: bool = False,
    key: str | None = None,
    ema: str | float | None = None,
) -> Model:
    """A model from a checkpoint.

    path_or_name: a native checkpoint, OpenAI's `.pt`, a `.pkl` of the EDM family, a diffusers folder, a checkpoint of
    openai/consistency_models_cifar10, the folder of a training run (its latest checkpoint), RUN/best (the best of those
    evaluated), an id of the Hugging Face Hub ("owner/name"), or the name of a bundled or published checkpoint.

    precision: computation precision inside the network. float32 is exact on every device; bfloat16 and float16 are
    faster on accelerators and halve the memory.

    revision, cache_dir, local_files_only: for ids, as in `huggingface_hub`: a branch, tag or commit; the cache folder
    (by default that of HF_HOME); whether to use the cache only. download: download a published checkpoint unless it is
    stored already.

    key: which network to load from a file or folder with several: "ema", "model". ema: which EMA of a training run:
    0.9999, "power_0.1", or "none" for the parameters without EMA; by default the one that the run samples from.

    What was chosen or left out in reading the file is logged as INFO. Raises InputError for a missing or damaged
    checkpoint, for several networks without a key, for an unknown key or EMA, and for a failed download.
    """
    if precision not in get_args(Precision):
        raise InputError(f"Expected precision {', '.join(get_args(Precision))}, got {precision!r}.")
    path = resolve(
        path_or_name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, download=download
    )
    source = conversion.read(path, conversion.CheckpointHints(key=key, ema=None if ema is None else str(ema)))
    for note in source.notes:
        _log.info("%s", note)
    return from_source(source, precision)


def from_source(source: conversion.Source, precision: Precision = "float32") -> Model:
    """The model of a checkpoint that `conversion.read` returned."""
    network = source.config.network.at_precision(precision)
    return Model(dataclasses.replace(source.config, network=network), network.prepare(source.params))
