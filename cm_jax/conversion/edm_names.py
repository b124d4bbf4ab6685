"""Tensor names of the EDM family's networks: SongUNet, DhariwalUNet and EDM2's U-Net, with their variants.

As for the other formats: the rules of a network, and the network that the names and shapes of a file determine. Names
are those of a network's state dict, without the prefix of the preconditioning around it ("model.", "unet.").
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from cm_jax.conversion.rules import Layout, Rule, Shapes
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, AnyNetwork, BuiltInNetwork, EDM2UNet, SongUNet
from cm_jax.networks.layers import NORM_EPSILON, NORM_GROUPS
from cm_jax.networks.unet_config import Unit

_RESIDUAL = {"norm_1": "norm0", "conv_1": "conv0", "embedding": "affine", "norm_2": "norm1", "conv_2": "conv1"}
_EDM2_RESIDUAL = {"conv_1": "conv_res0", "embedding": "emb_linear", "conv_2": "conv_res1", "skip": "conv_skip"}
_BUFFERS = re.compile(r"(.*\.)?resample_filter$|u$")
"""Tensors that follow from the architecture."""


def is_edm(shapes: Shapes) -> bool:
    """Whether the tensors have names of this family ("enc.32x32_conv.weight", after any prefix)."""
    return any(re.search(r"(^|\.)enc\.\d+x\d+_conv\.weight$", name) for name in shapes)


def network_prefix(shapes: Shapes) -> str:
    """The prefix of the network's tensors: "model." or "unet." in files of a preconditioning, or none."""
    stem = next(name for name in shapes if re.search(r"(^|\.)enc\.\d+x\d+_conv\.weight$", name))
    return stem[: stem.rindex("enc.")]


def is_buffer(name: str) -> bool:
    """Whether a tensor follows from the architecture: filters, and the levels of iDDPM."""
    return _BUFFERS.fullmatch(name) is not None


def rules(network: AnyNetwork) -> list[Rule]:
    """Rules of all parameters, in the order of the state dict.

    Raises InputError for networks that this family does not have.
    """
    if not isinstance(network, BuiltInNetwork):
        raise InputError(f"The EDM format has no networks such as {type(network).__name__}; use --to native.")
    height, width, _ = network.image_shape
    if height != width:
        raise InputError(f"The EDM format has square networks only, got {height} x {width} pixels; use --to native.")
    if network.guidance_embedding:
        raise InputError("The EDM format has no networks with a guidance embedding; use --to native.")
    if isinstance(network, EDM2UNet):
        return list(_edm2_rules(network))
    unsupported = {
        "a class-embedding table": isinstance(network, SongUNet)
        and network.label_embedding == "table"
        and network.classes,
        "an interval embedding": network.interval_embedding,
        "convolutions for resampling": network.resampling == "convolution",
        "additive modulation in an ADM U-Net": isinstance(network, ADMUNet) and network.modulation == "additive",
        "other group norms or attention than EDM's on narrow levels": not _has_variant_edm(network),
    }
    for feature, used in unsupported.items():
        if used:
            raise InputError(f"The EDM format has no networks with {feature}; use --to native.")
    return list(_rules(network))


def _has_variant_edm(network: BuiltInNetwork) -> bool:
    """Whether an ADM U-Net is the same function with variant="edm"."""
    if not isinstance(network, ADMUNet):
        return True
    if (network.norm_groups, network.norm_epsilon) != (NORM_GROUPS, NORM_EPSILON):
        return False
    edm = dataclasses.replace(network, variant="edm")
    widths = {width for _, unit, _ in units(network) for width in (unit.channels_in, unit.channels_out)}
    return edm.plan() == network.plan() and all(edm.style.groups(w) == network.style.groups(w) for w in widths)


def _layer(path: str, source: str, layout: Layout, *, norm: bool = False, bias: Layout | None = Layout.SAME):
    yield Rule(f"{path}/{'scale' if norm else 'kernel'}", (f"{source}.weight",), layout)
    if bias is not None:
        yield Rule(f"{path}/bias", (f"{source}.bias",), bias)


def _rules(network: SongUNet | ADMUNet) -> Iterator[Rule]:
    song, size = isinstance(network, SongUNet), network.image_shape[0]
    if isinstance(network, SongUNet) and network.embedding == "fourier":
        yield Rule("embedding/frequencies", ("map_noise.freqs",), Layout.SAME)
    if song and network.classes:
        yield from _layer("embedding/label", "map_label", Layout.DENSE)
    if network.augment_dim:
        yield Rule("embedding/augment", ("map_augment.weight",), Layout.DENSE)
    yield from _layer("embedding/dense_1", "map_layer0", Layout.DENSE)
    yield from _layer("embedding/dense_2", "map_layer1", Layout.DENSE)
    if not song and network.classes:
        yield Rule("embedding/table", ("map_label.weight",), Layout.DENSE)
    yield from _layer("stem", f"enc.{size}x{size}_conv", Layout.CONVOLUTION)
    for path, unit, source in units(network):
        match unit.kind:
            case "residual":
                for layer, name in _RESIDUAL.items():
                    norm, dense = layer.startswith("norm"), layer == "embedding"
                    layout = Layout.SAME if norm else Layout.DENSE if dense else Layout.CONVOLUTION
                    yield from _layer(f"{path}/{layer}", f"{source}.{name}", layout, norm=norm)
                if unit.channels_in != unit.channels_out or (song and unit.resample):
                    yield from _layer(f"{path}/skip", f"{source}.skip", Layout.POINTWISE)
            case "attention":
                yield from _layer(f"{path}/norm", f"{source}.norm2", Layout.SAME, norm=True)
                yield from _layer(f"{path}/qkv", f"{source}.qkv", Layout.INTERLEAVED, bias=Layout.INTERLEAVED_BIAS)
                yield from _layer(f"{path}/projection", f"{source}.proj", Layout.POINTWISE)
            case "pyramid":
                yield from _layer(path, source, Layout.CONVOLUTION)
    norm, output = (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv") if song else ("out_norm", "out_conv")
    yield from _layer("head/norm", norm, Layout.SAME, norm=True)
    yield from _layer("head/output", output, Layout.CONVOLUTION)
    if network.uncertainty:
        yield from _layer("uncertainty", "logvar_linear", Layout.DENSE)


def _edm2_rules(network: EDM2UNet) -> Iterator[Rule]:
    size, random = network.image_shape[0], network.variant == "edm2"

    def linear(path: str, source: str, layout: Layout = Layout.DENSE) -> Rule:
        return Rule(f"{path}/kernel", (f"{source}.weight",), layout)

    def features(path: str, source: str) -> Iterator[Rule]:
        name = f"{source}_{'fourier' if random else 'pos'}"
        yield Rule(f"{path}/frequencies", (f"{name}.freqs",), Layout.SAME)
        if random:
            yield Rule(f"{path}/phases", (f"{name}.phases",), Layout.SAME)

    yield Rule("head/gain", ("out_gain",), Layout.SAME)
    yield from features("embedding/features", "emb")
    yield linear("embedding/noise", "emb_noise")
    if network.classes:
        yield linear("embedding/label", "emb_label")
    if network.interval_embedding:
        yield Rule("embedding/interval", ("emb_t_k.weight",), Layout.DENSE)
    yield linear("stem", f"enc.{size}x{size}_conv", Layout.CONVOLUTION)
    for path, unit, source in units(network):
        if unit.kind == "attention":
            yield linear(f"{path}/qkv", f"{source}.attn_qkv", Layout.INTERLEAVED)
            yield linear(f"{path}/projection", f"{source}.attn_proj", Layout.POINTWISE)
            continue
        if random:
            yield Rule(f"{path}/embedding/gain", (f"{source}.emb_gain",), Layout.SAME)
        for layer, name in _EDM2_RESIDUAL.items():
            layout = {"embedding": Layout.DENSE, "skip": Layout.POINTWISE}.get(layer, Layout.CONVOLUTION)
            if layer != "skip" or unit.channels_in != unit.channels_out:
                yield linear(f"{path}/{layer}", f"{source}.{name}", layout)
    yield linear("head", "out_conv", Layout.CONVOLUTION)
    if network.uncertainty:
        yield from features("uncertainty", "logvar")
        yield linear("uncertainty/output", "logvar_linear")


def units(network: BuiltInNetwork) -> Iterator[tuple[str, Unit, str]]:
    """(parameter path, unit, source prefix) of every unit, in order."""
    plan, per_level, size = network.plan(), network.blocks_per_level, network.image_shape[0]
    deepest = len(network.channel_mult) - 1

    def at(level: int) -> str:
        return f"{size >> level}x{size >> level}"

    for index, block in enumerate(plan.encoder):
        level, number = divmod(index, per_level + 1)
        for unit in block.units:
            source = f"enc.{at(level)}_block{number}"
            if unit.resample:
                source = f"enc.{at(level + 1)}_{'aux_residual' if unit.kind == 'pyramid' else 'down'}"
            yield f"{block.name}/{unit.name}", unit, source
    for unit in plan.middle.units:
        yield f"middle/{unit.name}", unit, f"dec.{at(deepest)}_in{int(unit.name == 'residual_2')}"
    for index, block in enumerate(plan.decoder):
        level, number = deepest - index // (per_level + 1), index % (per_level + 1)
        for unit in block.units:
            source = f"dec.{at(level - 1)}_up" if unit.resample else f"dec.{at(level)}_block{number}"
            yield f"{block.name}/{unit.name}", unit, source


def buffers(network: BuiltInNetwork) -> dict[str, np.ndarray]:
    """The tensors of a state dict that follow from the architecture: filters of resampling convolutions."""
    if isinstance(network, EDM2UNet):
        return {}
    taps = np.array([1, 3, 3, 1] if network.resampling == "fir" else [1, 1], np.float32)
    kernel = np.outer(taps, taps)[None, None] / np.square(taps.sum())
    names = []
    for _, unit, source in units(network):
        if unit.resample:
            names += [source] if unit.kind == "pyramid" else [f"{source}.conv0", f"{source}.skip"]
    return {f"{name}.resample_filter": kernel for name in names}


def infer(shapes: Shapes, source: str, *, head_dim: int | None = None, **known: Any) -> BuiltInNetwork:
    """The network with tensors of these names and shapes, without prefix. `known`: fields that shapes do not determine.

    head_dim: channels of an attention head; by default 64, and all channels for SongUNet. Raises InputError where the
    tensors are not those of a network of this family. Missing and damaged tensors are not reported here.
    """

    def size(axis: int, *names: str) -> int:
        for name in names:
            if name in shapes and len(shapes[name]) > axis and 0 < shapes[name][axis] < 2**20:
                return shapes[name][axis]
        raise InputError(
            f"Expected the tensors of a U-Net of the EDM family in {source}, got {len(shapes)} tensors without "
            f"{names[0]}, starting with {', '.join(list(shapes)[:3])}."
        )

    places = [match for name in shapes if (match := re.match(r"enc\.(\d{1,5})x\1_(conv|block(\d{1,6}))\.", name))]
    sizes = sorted({int(match[1]) for match in places}, reverse=True)[:12]
    stem = next((match[0] + "weight" for match in places if match[2] == "conv"), "enc.*_conv.weight")
    width = size(0, stem)
    per_level = 1 + max((int(match[3]) for match in places if match[3] and int(match[1]) == sizes[0]), default=0)
    if per_level * len(sizes) > len(shapes):
        raise InputError(f"Expected {per_level} blocks at each resolution in {source}, got {len(shapes)} tensors.")
    edm2 = "emb_noise.weight" in shapes
    conv, qkv = ("conv_res1", "attn_qkv") if edm2 else ("conv1", "qkv")
    channels = [size(0, f"enc.{each}x{each}_block0.{conv}.weight", stem) for each in sizes]
    factors = [2**level for level, each in enumerate(sizes) if f"enc.{each}x{each}_block0.{qkv}.weight" in shapes]
    label = "emb_label.weight" if edm2 else "map_label.weight"
    fields: dict[str, Any] = {
        "image_size": sizes[0],
        "image_channels": size(1, stem) - int(edm2),
        "blocks_per_level": per_level,
        "attention_factors": tuple(factors),
        "classes": size(1, label) if label in shapes else None,
        "uncertainty": "logvar_linear.weight" in shapes,
    }
    if not edm2:
        fields["augment_dim"] = size(1, "map_augment.weight") if "map_augment.weight" in shapes else 0
    try:
        if edm2:
            random = "emb_fourier.freqs" in shapes
            noise = size(0, "emb_fourier.freqs") if random else 2 * size(0, "emb_pos.freqs")
            embedding = size(0, "emb_noise.weight")
            return EDM2UNet(
                **fields,
                **_widths(channels, channels[0]),
                variant="edm2" if random else "trigflow",
                head_dim=head_dim or 64,
                noise_channels=None if noise == channels[0] else noise,
                embedding_channels=None if embedding == max(channels) else embedding,
                interval_embedding="emb_t_k.weight" in shapes,
                **known,
            )
        if "out_conv.weight" in shapes:
            outputs = size(0, "out_conv.weight")
            return ADMUNet(
                **fields,
                **_widths(channels, size(1, "map_layer0.weight")),
                head_dim=head_dim or 64,
                variant="edm",
                output_channels=None if outputs == fields["image_channels"] else outputs,
                **known,
            )
        modulated = size(0, f"enc.{sizes[0]}x{sizes[0]}_block0.affine.weight") // channels[0]
        down = f"enc.{sizes[-1]}x{sizes[-1]}_down.conv0.resample_filter"
        return SongUNet(
            **fields,
            **_widths(channels, width),
            embedding="fourier" if "map_noise.freqs" in shapes else "positional",
            pyramid=any("_aux_residual." in name for name in shapes),
            resampling="fir" if shapes.get(down, (1, 1, 2, 2))[-1] == 4 else "plain",
            modulation="normalized" if modulated == 2 else "additive",
            label_embedding="linear",
            **known,
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _widths(channels: list[int], width: int) -> dict[str, Any]:
    multipliers = tuple(count // width if count % width == 0 else count / width for count in channels)
    return {"base_channels": width, "channel_mult": multipliers}
