"""The grid of samples that shows how a run goes: the same noise every time."""

import numpy as np
from PIL import Image

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.io.images import grid, quantize
from cm_jax.model import Model
from cm_jax.types import Params

_ROWS, _COLUMNS = 9, 5
_SEED = 0
_TEACHER_STEPS = 18


def sheet(config: ModelConfig, params: Params) -> Image.Image:
    """Of a denoiser ten images a row in 18 steps of Heun; of a consistency model five in one step, then in two.

    A row is a class, where there are classes: all of them, or nine spread evenly.
    """
    model = Model(config, params)
    classes = config.network.classes
    rows = np.linspace(0, classes - 1, min(_ROWS, classes)).astype(int) if classes else np.arange(_ROWS)
    names = [config.class_names[row] if config.class_names else f"class {row}" for row in rows] if classes else ()

    def drawn(columns: int, steps: int) -> np.ndarray:
        labels = np.repeat(rows, columns) if classes else None
        images = model.sample(_SEED, len(rows) * columns, labels=labels, steps=steps)
        return quantize(images).reshape(len(rows), columns, *images.shape[1:])

    halves = [drawn(_COLUMNS, 1), drawn(_COLUMNS, 2)] if config.distilled else [drawn(2 * _COLUMNS, _TEACHER_STEPS)]
    together = np.concatenate(halves, axis=1)
    return grid(together.reshape(-1, *together.shape[2:]), 2 * _COLUMNS, names)
