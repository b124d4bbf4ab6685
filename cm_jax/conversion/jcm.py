"""Tensor names of openai/consistency_models_cifar10 ("jcm"), a Flax program that numbers modules in order of creation.

As for the PyTorch formats: the rules of a network, and the networks that match the names and shapes of a file.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator

from cm_jax.conversion.rules import Layout, Rule, Shapes, source_shapes
from cm_jax.errors import InputError, shape_complaints
from cm_jax.networks import SongUNet

BRANCH = "params_ema"
"""The branch of a checkpoint that holds the EMA weights, which OpenAI samples with."""

_RESIDUAL, _ATTENTION, _PYRAMID = "ResnetBlockBigGANpp", "AttnBlockpp", "Downsample"


def rules(network: SongUNet) -> list[Rule]:
    """Rules of all parameters of an unconditional network with additive modulation, as all jcm networks are."""
    return list(_rules(network))


def _rules(network: SongUNet) -> Iterator[Rule]:
    def layer(
        path: str, source: str, weight: str = "kernel", bias: str = "bias", layout: Layout = Layout.SAME
    ) -> Iterator[Rule]:
        leaf = "scale" if weight == "scale" else "kernel"
        yield Rule(f"{path}/{leaf}", (f"{source}/{weight}",), layout)
        yield Rule(f"{path}/bias", (f"{source}/{bias}",), Layout.SAME)

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
                    yield from layer(f"{path}/norm_1", f"{source}/GroupNorm_0", "scale")
                    yield from layer(f"{path}/conv_1", f"{source}/Conv_0")
                    yield from layer(f"{path}/embedding", f"{source}/Dense_0")
                    yield from layer(f"{path}/norm_2", f"{source}/GroupNorm_1", "scale")
                    yield from layer(f"{path}/conv_2", f"{source}/Conv_1")
                    if unit.resample or unit.channels_in != unit.channels_out:
                        yield from layer(f"{path}/skip", f"{source}/Conv_2", layout=Layout.FLAX_POINTWISE)
                case "attention":
                    source = f"{_ATTENTION}_{next(numbers[_ATTENTION])}"
                    yield from layer(f"{path}/norm", f"{source}/GroupNorm_0", "scale")
                    for leaf, name in (("kernel", "W"), ("bias", "b")):
                        thirds = tuple(f"{source}/NIN_{third}/{name}" for third in range(3))
                        yield Rule(f"{path}/qkv/{leaf}", thirds, Layout.SAME)
                    yield from layer(f"{path}/projection", f"{source}/NIN_3", "W", "b")
                case "pyramid":
                    yield from layer(path, f"{_PYRAMID}_{next(numbers[_PYRAMID])}/Conv2d_0", "weight")
    yield from layer("head/norm", "GroupNorm_0", "scale")
    yield from layer("head/output", "Conv_1")


def candidates(shapes: Shapes, source: str, *, image_size: int) -> list[SongUNet]:
    """The networks that match these names and shapes best; they differ only in what tensors do not determine.

    That is which of several equally wide levels have attention, and the filter of a network without an input pyramid.
    Raises InputError where the tensors are not those of an NCSN++. A few missing or damaged tensors do not matter here.
    """
    blocks, attentions, pyramids = (_count(shapes, kind) for kind in (_RESIDUAL, _ATTENTION, _PYRAMID))
    scored = []
    for levels in range(1, blocks + 1):
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
    found = (re.match(rf"{kind}_(\d+)/", name) for name in shapes)
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
        "channel_mult": tuple(int(count / width) if count % width == 0 else count / width for count in counts),
        "blocks_per_level": per_level,
        "embedding": "fourier" if "GaussianFourierProjection_0/W" in shapes else "positional",
        "pyramid": _count(shapes, _PYRAMID) > 0,
    }
