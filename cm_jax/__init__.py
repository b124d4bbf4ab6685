"""Consistency models in JAX.

import cm_jax
model = cm_jax.load("openai/diffusers-cd_imagenet64_lpips")    # an id of the Hugging Face Hub, a path, or a name
images = model.sample(0, 4, labels="king penguin", steps=2)    # NHWC float32 in [-1, 1]
cm_jax.save_images(images, "penguins.png")
"""

from cm_jax.checkpoints.registry import register
from cm_jax.errors import InputError
from cm_jax.exporting import export
from cm_jax.io.images import image_grid, save_images
from cm_jax.loading import load
from cm_jax.model import Model

__version__ = "0.1.0"
__all__ = ["InputError", "Model", "export", "image_grid", "load", "register", "save_images"]
