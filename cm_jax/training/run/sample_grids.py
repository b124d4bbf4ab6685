"""Grids of samples during training, always from the same noise."""

import numpy as np
from PIL import Image

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.io.images import grid, quantize
from cm_jax.model import Model
from cm_jax.types import Params

_ROWS, _COLUMNS = 9, 10
_SEED = 0
_DENOISER_STEPS = 18


def sample_grid(config: ModelConfig, params: Params) -> Image.Image:
    """Ten samples per row: of a consistency model five in one step and five in two, of a denoiser in 18 Heun steps.

    Each row is a class, if there are classes: all of them, or nine evenly spaced ones.
    """
    model = Model(config, params)
    classes = config.network.classes
    rows = np.linspace(0, classes - 1, min(_ROWS, classes)).astype(int) if classes else np.arange(_ROWS)
    names = [config.class_names[row] if config.class_names else f"class {row}" for row in rows] if classes else ()

    def samples(columns: int, steps: int) -> np.ndarray:
        labels = np.repeat(rows, columns) if classes else None
        images = model.sample(_SEED, len(rows) * columns, labels=labels, steps=steps)
        return quantize(images).reshape(len(rows), columns, *images.shape[1:])

    half = _COLUMNS // 2
    blocks = [samples(half, 1), samples(half, 2)] if config.distilled else [samples(_COLUMNS, _DENOISER_STEPS)]
    images = np.concatenate(blocks, axis=1)
    return grid(images.reshape(-1, *images.shape[2:]), _COLUMNS, names)
