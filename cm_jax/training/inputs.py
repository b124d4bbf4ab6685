"""The checkpoints and the data that a run reads."""

import os
from typing import Literal

from cm_jax import conversion
from cm_jax.checkpoints.published import BUNDLED, resolve
from cm_jax.conversion import Source
from cm_jax.data import Dataset
from cm_jax.errors import InputError
from cm_jax.training.config import TrainConfig


class Inputs:
    """The checkpoints and the data of a run."""

    def checkpoint(self, config: TrainConfig, field: Literal["teacher", "init_from"]) -> Source:
        """The checkpoint that a field of the config names. Raises InputError."""
        name, flag = getattr(config, field), field.replace("_", "-")
        key, ema = (getattr(config, f"{field}_{choice}") or None for choice in ("key", "ema"))
        try:
            return conversion.read(resolve(name), conversion.CheckpointHints(key=key, ema=ema))
        except InputError as error:
            folder = name.removesuffix("/best")
            preset = folder.removeprefix("runs/")
            named = preset != folder and not os.path.exists(folder)
            bundled = preset.replace("-", "_")
            instead = f", or use the bundled one: --{flag} {bundled}" if bundled in BUNDLED else ""
            advice = f" Train it first: cm-jax train {preset}{instead}." if named else ""
            if os.path.isfile(name):
                advice = f" Convert it with `cm-jax convert` and give the new folder to --{flag}."
            raise InputError(f"--{flag} {name}: {error}{advice}") from error

    def data(self, config: TrainConfig, inherited: bool = False) -> Dataset:
        """The training images at the size of the network. Raises InputError.

        inherited: whether they are those of the run of the checkpoint, for the message.
        """
        shape = config.network.image_shape
        try:
            return config.data.open(shape[:2], channels=shape[2])
        except InputError as error:
            advice = (
                f" These are the data of {config.initial_checkpoint}: give others with --data." if inherited else ""
            )
            raise InputError(f"{error}{advice}") from error
