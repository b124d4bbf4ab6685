"""The names of openai/consistency_models_cifar10 ("jcm"): a Flax program whose modules are numbered as they are made.

The same two things as in `formats`: the rules of a network, and the networks that a file's names and shapes allow.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping

from cm_jax.conversion.rules import Layout, Rule
from cm_jax.errors import InputError, shape_complaints
from cm_jax.networks import SongUNet
from cm_jax.types import leaves

Shapes = Mapping[str, tuple[int, ...]]

BRANCH = "params_ema"
"""Where a checkpoint of theirs keeps the weights that they sample with."""

_RESIDUAL, _ATTENTION, _PYRAMID = "ResnetBlockBigGANpp", "AttnBlockpp", "Downsample"


def rules(network: SongUNet) -> list[Rule]:
    """The rules of all leaves of an unconditional network with additive modulation, as all of theirs are."""
    return list(_rules(network))


def _rules(network: SongUNet) -> Iterator[Rule]:
    def layer(
        ours: str, theirs: str, weight: str = "kernel", bias: str = "bias", layout: Layout = Layout.SAME
    ) -> Iterator[Rule]:
        leaf = "scale" if weight == "scale" else "kernel"
        yield Rule(f"{ours}/{leaf}", (f"{theirs}/{weight}",), layout)
        yield Rule(f"{ours}/bias", (f"{theirs}/{bias}",), Layout.SAME)

    if network.embedding == "fourier":
        yield Rule("embedding/frequencies", ("GaussianFourierProjection_0/W",), Layout.SAME)
    yield from layer("embedding/dense_1", "Dense_0")
    yield from layer("embedding/dense_2", "Dense_1")
    yield from layer("stem", "Conv_0")
    numbers = {kind: itertools.count() for kind in (_RESIDUAL, _ATTENTION, _PYRAMID)}
    for block in network.plan().blocks:
        for unit in block.units:
            ours = f"{block.name}/{unit.name}"
            match unit.kind:
                case "residual":
                    theirs = f"{_RESIDUAL}_{next(numbers[_RESIDUAL])}"
                    yield from layer(f"{ours}/norm_1", f"{theirs}/GroupNorm_0", "scale")
                    yield from layer(f"{ours}/conv_1", f"{theirs}/Conv_0")
                    yield from layer(f"{ours}/embedding", f"{theirs}/Dense_0")
                    yield from layer(f"{ours}/norm_2", f"{theirs}/GroupNorm_1", "scale")
                    yield from layer(f"{ours}/conv_2", f"{theirs}/Conv_1")
                    if unit.resample or unit.channels_in != unit.channels_out:
                        yield from layer(f"{ours}/skip", f"{theirs}/Conv_2", layout=Layout.FLAX_POINTWISE)
                case "attention":
                    theirs = f"{_ATTENTION}_{next(numbers[_ATTENTION])}"
                    yield from layer(f"{ours}/norm", f"{theirs}/GroupNorm_0", "scale")
                    for leaf, name in (("kernel", "W"), ("bias", "b")):
                        thirds = tuple(f"{theirs}/NIN_{third}/{name}" for third in range(3))
                        yield Rule(f"{ours}/qkv/{leaf}", thirds, Layout.SAME)
                    yield from layer(f"{ours}/projection", f"{theirs}/NIN_3", "W", "b")
                case "pyramid":
                    yield from layer(ours, f"{_PYRAMID}_{next(numbers[_PYRAMID])}/Conv2d_0", "weight")
    yield from layer("head/norm", "GroupNorm_0", "scale")
    yield from layer("head/output", "Conv_1")


def candidates(shapes: Shapes, source: str, *, image_size: int) -> list[SongUNet]:
    """The networks that these names and shapes fit best, alike but for what cannot be read off them.

    That is where attention stands among levels of equal width, and the filter of a network without a pyramid. Raises
    InputError where they are not an NCSN++'s at all; a few missing or damaged tensors do not matter here.
    """
    blocks, attentions, pyramids = (_count(shapes, kind) for kind in (_RESIDUAL, _ATTENTION, _PYRAMID))
    scored = []
    for levels in range(1, blocks + 1):
        per_level, odd = divmod(
            blocks // levels - 3, 2
        )  # each level: b down, b + 1 up, two that resample or stand amid
        if blocks % levels or odd or per_level < 1 or (attentions - 1) % (per_level + 1):
            continue
        for attending in itertools.combinations(range(levels), (attentions - 1) // (per_level + 1)):
            fields = _fields(shapes, levels, per_level)
            if fields is None:
                continue
            try:
                network = SongUNet(
                    image_size=image_size, attention_factors=tuple(2**level for level in attending), **fields
                )
            except InputError:
                continue
            ours = {name: leaf.shape for name, leaf in leaves(network.shapes())}
            wanted = {name: rule.their_shape(ours[rule.ours]) for rule in rules(network) for name in rule.theirs}
            filters = ("fir",) if pyramids else ("fir", "plain")
            scored.append((len(shape_complaints(wanted, shapes)), network, filters))
    if not scored:
        raise InputError(
            f"{source} is not a network of openai/consistency_models_cifar10: of its {len(shapes)} tensors, {blocks} "
            f"blocks are named {_RESIDUAL}_i and {attentions} {_ATTENTION}_i. Wanted: a checkpoint of its ncsnpp model."
        )
    best = min(score for score, _, _ in scored)
    return [
        dataclasses.replace(network, resampling=by)
        for score, network, filters in scored
        for by in filters
        if score == best
    ]


def _count(shapes: Shapes, kind: str) -> int:
    found = (re.match(rf"{kind}_(\d+)/", name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _fields(shapes: Shapes, levels: int, per_level: int) -> dict | None:
    """The fields that shapes tell; None where what would tell them is not there."""

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
