"""Checkpoints of openai/consistency_models_cifar10 ("jcm"), a Flax program that numbers modules in order of creation.

As for the PyTorch formats: the tensors of a file, the rules of a network, and the networks that match names and shapes.
Files are MessagePack, which holds only numbers, text, maps and bytes.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np

from cm_jax.conversion.rules import Layout, Rule, Shapes, source_shapes
from cm_jax.conversion.torch_files import STORAGES
from cm_jax.errors import InputError, indented_list, shape_complaints
from cm_jax.io.atomic import read_errors
from cm_jax.io.safetensors import LazyTensor
from cm_jax.networks import SongUNet
from cm_jax.types import ImageSize, leaves

_BRANCH = "params_ema"
"""The branch of a checkpoint that holds the EMA weights, which OpenAI samples with."""
_FLAX_ARRAY = 1
"""MessagePack extension type of a Flax array: shape, dtype name, bytes."""
_FLAX_DTYPES = {dtype.name: dtype for dtype in STORAGES.values()}
_RESIDUAL, _ATTENTION, _PYRAMID = "ResnetBlockBigGANpp", "AttnBlockpp", "Downsample"
_MOST_LEVELS = 8
"""Resolutions of a network. The choices of those with attention are twice as many with each; the published have 3."""
_LEAVES = {"GroupNorm": ("scale", "bias"), "NIN": ("W", "b"), "Conv2d": ("weight", "bias")}
"""Names of weight and bias in these modules; kernel and bias in all others."""


def is_msgpack(path: Path) -> bool:
    """Whether a file starts like a MessagePack map of 1 to 15 entries, as no zip archive or pickle does."""
    with path.open("rb") as file:
        first = file.read(1)
    return b"\x81" <= first <= b"\x8f"


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """EMA weights by path ("Dense_0/kernel").

    The rest of the file is skipped; two thirds of it are optimizer states. Raises InputError for a damaged file, and
    where the branch is missing or holds anything but arrays.
    """
    with read_errors(path, "Flax checkpoint"), path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, ext_hook=_flax_array, max_buffer_size=0, strict_map_key=True)
        found = []
        for _ in range(unpacker.read_map_header()):
            found.append(unpacker.unpack())
            if found[-1] == _BRANCH:
                flat = dict(leaves(unpacker.unpack()))
                break
            unpacker.skip()
        else:
            got = ", ".join(map(str, found))
            raise InputError(f"Expected {_BRANCH!r} in {path}, got only {got}; use a complete checkpoint.")
    others = [name for name, leaf in flat.items() if not isinstance(leaf, LazyTensor)]
    if others:
        raise InputError(f"Expected arrays only under {_BRANCH!r} in {path}, got others:\n  {indented_list(others)}")
    return flat


def _flax_array(code: int, content: bytes) -> LazyTensor:
    if code != _FLAX_ARRAY:
        raise ValueError(f"expected an array, got extension type {code}")
    shape, name, numbers = msgpack.unpackb(content)
    array = np.frombuffer(numbers, _FLAX_DTYPES[name]).reshape(shape)
    return LazyTensor(array.shape, array.dtype, lambda: array)


def rules(network: SongUNet) -> list[Rule]:
    """Rules of all parameters of an unconditional network with additive modulation, as all jcm networks are."""
    return list(_rules(network))


def _rules(network: SongUNet) -> Iterator[Rule]:
    def layer(path: str, *sources: str, layout: Layout = Layout.SAME) -> Iterator[Rule]:
        weight, bias = _LEAVES.get(sources[0].rsplit("/")[-1].split("_")[0], ("kernel", "bias"))
        leaf = "scale" if weight == "scale" else "kernel"
        yield Rule(f"{path}/{leaf}", tuple(f"{source}/{weight}" for source in sources), layout)
        yield Rule(f"{path}/bias", tuple(f"{source}/{bias}" for source in sources), Layout.SAME)

    if network.embedding == "fourier":
        yield Rule("embedding/frequencies", ("GaussianFourierProjection_0/W",), Layout.SAME)
    yield from layer("embedding/dense_1", "Dense_0")
    yield from layer("embedding/dense_2", "Dense_1")
    yield from layer("stem", "Conv_0")
    numbers = {kind: itertools.count() for kind in (_RESIDUAL, _ATTENTION, _PYRAMID)}
    for block in network.plan().blocks:
        for unit in block.units:
            path = f"{block.name}/{unit.name}"
            match unit.kind:
                case "residual":
                    source = f"{_RESIDUAL}_{next(numbers[_RESIDUAL])}"
                    yield from layer(f"{path}/norm_1", f"{source}/GroupNorm_0")
                    yield from layer(f"{path}/conv_1", f"{source}/Conv_0")
                    yield from layer(f"{path}/embedding", f"{source}/Dense_0")
                    yield from layer(f"{path}/norm_2", f"{source}/GroupNorm_1")
                    yield from layer(f"{path}/conv_2", f"{source}/Conv_1")
                    if unit.resample or unit.channels_in != unit.channels_out:
                        yield from layer(f"{path}/skip", f"{source}/Conv_2", layout=Layout.FLAX_POINTWISE)
                case "attention":
                    source = f"{_ATTENTION}_{next(numbers[_ATTENTION])}"
                    yield from layer(f"{path}/norm", f"{source}/GroupNorm_0")
                    yield from layer(f"{path}/qkv", *(f"{source}/NIN_{third}" for third in range(3)))
                    yield from layer(f"{path}/projection", f"{source}/NIN_3")
                case "pyramid":
                    yield from layer(path, f"{_PYRAMID}_{next(numbers[_PYRAMID])}/Conv2d_0")
    yield from layer("head/norm", "GroupNorm_0")
    yield from layer("head/output", "Conv_1")


def candidates(shapes: Shapes, source: str, *, image_size: ImageSize) -> list[SongUNet]:
    """The networks that match these names and shapes best; they differ only in what tensors do not determine.

    That is which of several equally wide levels have attention, and the filter of a network without an input pyramid.
    Raises InputError where the tensors are not those of an NCSN++. A few missing or damaged tensors do not matter here.
    """
    blocks, attentions, pyramids = (_count(shapes, kind) for kind in (_RESIDUAL, _ATTENTION, _PYRAMID))
    scored = []
    if max(blocks, attentions, pyramids) > len(shapes):
        raise InputError(
            f"Expected at most one block for each of the {len(shapes)} tensors in {source}, got names of {blocks} "
            f"blocks {_RESIDUAL}_i, {attentions} {_ATTENTION}_i and {pyramids} {_PYRAMID}_i; use a complete checkpoint."
        )
    for levels in range(1, min(blocks, _MOST_LEVELS) + 1):
        # A level with b blocks has 2 b + 3 residual blocks: b in the encoder, b + 1 in the decoder, and two that
        # resample, in place of which the last level has those in the middle.
        per_level, odd = divmod(blocks // levels - 3, 2)
        if blocks % levels or odd or per_level < 1 or (attentions - 1) % (per_level + 1):
            continue
        fields = _fields(shapes, levels, per_level)
        if fields is None:
            continue
        for attending in itertools.combinations(range(levels), (attentions - 1) // (per_level + 1)):
            factors = tuple(2**level for level in attending)
            try:
                network = SongUNet(image_size=image_size, attention_factors=factors, **fields)
            except InputError:
                continue
            expected = source_shapes(rules(network), network.shapes())
            scored.append((len(shape_complaints(expected, shapes)), network))
    if not scored:
        raise InputError(
            f"Expected a checkpoint of the ncsnpp model of openai/consistency_models_cifar10, got {len(shapes)} "
            f"tensors in {source}, with {blocks} blocks named {_RESIDUAL}_i and {attentions} named {_ATTENTION}_i."
        )
    best = min(score for score, _ in scored)
    filters = ("fir",) if pyramids else ("fir", "plain")
    return [
        dataclasses.replace(network, resampling=resampling)
        for score, network in scored
        for resampling in filters
        if score == best
    ]


def _count(shapes: Shapes, kind: str) -> int:
    found = (re.match(rf"{kind}_(\d{{1,18}})/", name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _fields(shapes: Shapes, levels: int, per_level: int) -> dict | None:
    """The fields that shapes determine; None where a tensor that determines one is missing."""

    def channels(name: str) -> int:
        found = (shapes[f"{name}/{leaf}"] for leaf in ("bias", "kernel") if f"{name}/{leaf}" in shapes)
        return next((shape[-1] for shape in found if shape), 0)

    width = channels("Conv_0")
    counts = [channels(f"{_RESIDUAL}_{level * (per_level + 1)}/Conv_1") for level in range(levels)]
    if not width or not all(counts) or not channels("Conv_1"):
        return None
    return {
        "image_channels": channels("Conv_1"),
        "base_channels": width,
        "channel_mult": tuple(count / width if count % width else count // width for count in counts),
        "blocks_per_level": per_level,
        "embedding": "fourier" if "GaussianFourierProjection_0/W" in shapes else "positional",
        "pyramid": _count(shapes, _PYRAMID) > 0,
    }
