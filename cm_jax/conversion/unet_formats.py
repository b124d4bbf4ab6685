"""The two PyTorch spellings of the ADM U-Net: what each calls the parts that `ADMUNet.plan` lists.

A `Format` is a table of names. From it come the rules of any network, and the architecture of any file: how deep the
network is can be read off the names, how wide off the shapes.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from cm_jax.conversion.rules import Layout, Rule
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.networks.layers import Resample
from cm_jax.networks.plan import Unit

SAME, DENSE, POINTWISE, CONVOLUTION = Layout.SAME, Layout.DENSE, Layout.POINTWISE, Layout.CONVOLUTION

Layer = tuple[str | tuple[str, ...], Layout]
"""What they call one of our layers (several names where they split it), and how its weight is laid out."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Format:
    """Names of one PyTorch spelling; keys are the layers of cm_jax/networks, in their order in the foreign file."""

    title: str
    entrance: dict[str, Layer]
    exit: dict[str, Layer]
    residual: dict[str, Layer]
    attention: dict[str, Layer]
    convolution: dict[Resample, str]
    """What they call the convolution inside a resampling unit that is no residual block."""

    def unit(self, stage: str, block: int, position: int, unit: Unit, blocks_per_level: int) -> str:
        """Their prefix for a unit: the `position`-th of the `block`-th block of encoder, middle or decoder."""
        raise NotImplementedError

    def depth(self, shapes: Shapes) -> tuple[int, int]:
        """(levels, blocks per level), read off the names."""
        raise NotImplementedError

    def rules(self, network: ADMUNet) -> list[Rule]:
        """The rules of all leaves of `network`, in the order of their state dict.

        Raises InputError for networks that PyTorch's programs do not have: with normalised modulation or two clocks.
        """
        if network.interval_embedding:
            raise InputError(
                f"{self.title} has no networks with an interval clock: this one can be written as ours only."
            )
        if network.modulation == "normalized":
            raise InputError(
                f"{self.title} has no networks with normalised modulation: this one can be written as ours only."
            )
        rules: list[Rule] = []

        def add(ours: str, layer: Layer, prefix: str = "") -> None:
            names, layout = layer
            theirs = tuple(prefix + name for name in ([names] if isinstance(names, str) else names))
            if ours.endswith("/table"):
                rules.append(Rule(ours, tuple(f"{name}.weight" for name in theirs), layout))
                return
            weight = "scale" if ours.split("/")[-1].startswith("norm") else "kernel"
            rules.append(Rule(f"{ours}/{weight}", tuple(f"{name}.weight" for name in theirs), layout))
            rules.append(Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), SAME))

        for ours, layer in self.entrance.items():
            if ours != "embedding/table" or network.classes is not None:
                add(ours, layer)
        for name, unit, prefix in self.units(network):
            if unit.kind == "convolution":
                assert unit.resample is not None
                add(name, (self.convolution[unit.resample], CONVOLUTION), f"{prefix}.")
                continue
            for layer_name, layer in (self.residual if unit.kind == "residual" else self.attention).items():
                if layer_name != "skip" or unit.channels_in != unit.channels_out:
                    add(f"{name}/{layer_name}", layer, f"{prefix}.")
        for ours, layer in self.exit.items():
            add(ours, layer)
        return rules

    def units(self, network: ADMUNet) -> list[tuple[str, Unit, str]]:
        """(our path, unit, their prefix) of every unit, in order."""
        plan = network.plan()
        stages = {"encoder": plan.encoder, "middle": (plan.middle,), "decoder": plan.decoder}
        return [
            (f"{block.name}/{unit.name}", unit, self.unit(stage, index, position, unit, network.blocks_per_level))
            for stage, blocks in stages.items()
            for index, block in enumerate(blocks)
            for position, unit in enumerate(block.units)
        ]

    def infer(self, shapes: Shapes, source: str, **known: Any) -> ADMUNet:
        """The network whose tensors these are; `known` gives the fields that shapes cannot tell.

        Raises InputError where they are not an ADM U-Net's at all. A few missing or damaged tensors do not matter here:
        they are reported, all together, when the rules are applied.
        """

        foreign = InputError(
            f"{source} is not an ADM U-Net in {self.title}'s naming; its {len(shapes)} tensors begin with "
            f"{', '.join(list(shapes)[:3])}. Wanted: the weights of a consistency model or of its EDM teacher."
        )

        def size(axis: int, *names: str) -> int:
            """The axis of the first of these tensors that is there."""
            for name in names:
                if name in shapes and len(shapes[name]) > axis and shapes[name][axis] > 0:
                    return shapes[name][axis]
            raise foreign

        def layer_name(layer: Layer) -> str:
            return layer[0] if isinstance(layer[0], str) else layer[0][0]

        dense_1, stem, table = (
            layer_name(self.entrance[name]) for name in ("embedding/dense_1", "stem", "embedding/table")
        )
        width = size(1, f"{dense_1}.weight")
        levels, blocks_per_level = self.depth(shapes)
        if not 0 < levels * blocks_per_level < len(shapes):
            raise foreign

        channels, attention_factors = [], []
        modulated = 0
        for level in range(levels):
            block = level * (blocks_per_level + 1)
            residual = self.unit("encoder", block, 0, Unit("residual", "", 0, 0), blocks_per_level)
            inside = {name: f"{residual}.{layer_name(layer)}" for name, layer in self.residual.items()}
            channels.append(
                size(0, f"{inside['norm_2']}.weight", f"{inside['conv_2']}.bias", f"{inside['conv_1']}.bias")
            )
            modulated = (
                modulated or size(0, f"{inside['embedding']}.bias", f"{inside['embedding']}.weight") // channels[0]
            )
            attention = self.unit("encoder", block, 1, Unit("attention", "", 0, 0), blocks_per_level)
            if any(name.startswith(f"{attention}.{layer_name(self.attention['norm'])}.") for name in shapes):
                attention_factors.append(2**level)

        downsample = self.unit(
            "encoder", blocks_per_level, 0, Unit("convolution", "downsample", 0, 0, "down"), blocks_per_level
        )
        convolutional = any(name.startswith(f"{downsample}.{self.convolution['down']}.") for name in shapes)
        output_channels = size(
            0, f"{layer_name(self.exit['head/output'])}.bias", f"{layer_name(self.exit['head/output'])}.weight"
        )
        image_channels = size(1, f"{stem}.weight")
        if output_channels == 2 * image_channels:
            raise InputError(
                f"{source} puts out {output_channels} channels for {image_channels}: it also learned variances "
                "(learn_sigma), as diffusion models of 2021 did. Consistency models and EDM teachers do not: "
                "give one of those."
            )
        fields = {
            "image_channels": image_channels,
            "base_channels": width,
            "channel_mult": tuple(_tidy(count / width) for count in channels),
            "blocks_per_level": blocks_per_level,
            "attention_factors": tuple(attention_factors),
            "classes": size(0, f"{table}.weight") if f"{table}.weight" in shapes else None,
            "modulation": "scale_shift" if modulated == 2 else "additive",
            "resampling": "convolution" if convolutional else "residual",
        }
        try:
            return ADMUNet(**fields, **known)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def _tidy(number: float) -> float:
    return int(number) if number == int(number) else number


class _OpenAI(Format):
    """State dicts of openai/consistency_models."""

    def unit(self, stage: str, block: int, position: int, unit: Unit, blocks_per_level: int) -> str:
        del unit, blocks_per_level
        if stage == "middle":
            return f"middle_block.{position}"
        return f"input_blocks.{block + 1}.{position}" if stage == "encoder" else f"output_blocks.{block}.{position}"

    def depth(self, shapes: Shapes) -> tuple[int, int]:
        parts = [re.match(r"output_blocks\.(\d{1,6})\.(\d{1,6})\.(\w+)", name) for name in shapes]
        found = {(int(part[1]), int(part[2]), part[3]) for part in parts if part}
        if not found:
            return 0, 0
        count = max(block for block, _, _ in found) + 1
        upsampling = {b for b, position, inner in found if position > 0 and inner not in ("norm", "qkv", "proj_out")}
        levels = len(upsampling) + 1
        return levels, (min(upsampling) if upsampling else count - 1)


class _Diffusers(Format):
    """`UNet2DModel` as diffusers' ConsistencyModelPipeline uses it."""

    def unit(self, stage: str, block: int, position: int, unit: Unit, blocks_per_level: int) -> str:
        if stage == "middle":
            return "mid_block.attentions.0" if unit.kind == "attention" else f"mid_block.resnets.{position // 2}"
        level, index = divmod(block, blocks_per_level + 1)
        prefix = f"down_blocks.{level}" if stage == "encoder" else f"up_blocks.{level}"
        if unit.resample:
            return f"{prefix}.{unit.resample}samplers.0"
        return f"{prefix}.{'attentions' if unit.kind == 'attention' else 'resnets'}.{index}"

    def depth(self, shapes: Shapes) -> tuple[int, int]:
        found = [re.match(r"(down|up)_blocks\.(\d{1,6})\.resnets\.(\d{1,6})\.", name) for name in shapes]
        levels = {int(part[2]) + 1 for part in found if part}
        blocks = {int(part[3]) + (1 if part[1] == "down" else 0) for part in found if part}
        return max(levels, default=0), max(blocks, default=0)


OPENAI = _OpenAI(
    title="openai/consistency_models",
    entrance={
        "embedding/dense_1": ("time_embed.0", DENSE),
        "embedding/dense_2": ("time_embed.2", DENSE),
        "embedding/table": ("label_emb", SAME),
        "stem": ("input_blocks.0.0", CONVOLUTION),
    },
    exit={"head/norm": ("out.0", SAME), "head/output": ("out.2", CONVOLUTION)},
    residual={
        "norm_1": ("in_layers.0", SAME),
        "conv_1": ("in_layers.2", CONVOLUTION),
        "embedding": ("emb_layers.1", DENSE),
        "norm_2": ("out_layers.0", SAME),
        "conv_2": ("out_layers.3", CONVOLUTION),
        "skip": ("skip_connection", POINTWISE),
    },
    attention={"norm": ("norm", SAME), "qkv": ("qkv", POINTWISE), "projection": ("proj_out", POINTWISE)},
    convolution={"down": "op", "up": "conv"},
)

DIFFUSERS = _Diffusers(
    title="diffusers",
    entrance={
        "stem": ("conv_in", CONVOLUTION),
        "embedding/dense_1": ("time_embedding.linear_1", DENSE),
        "embedding/dense_2": ("time_embedding.linear_2", DENSE),
        "embedding/table": ("class_embedding", SAME),
    },
    exit={"head/norm": ("conv_norm_out", SAME), "head/output": ("conv_out", CONVOLUTION)},
    residual={
        "norm_1": ("norm1", SAME),
        "conv_1": ("conv1", CONVOLUTION),
        "embedding": ("time_emb_proj", DENSE),
        "norm_2": ("norm2", SAME),
        "conv_2": ("conv2", CONVOLUTION),
        "skip": ("conv_shortcut", POINTWISE),
    },
    attention={
        "norm": ("group_norm", SAME),
        "qkv": (("to_q", "to_k", "to_v"), DENSE),
        "projection": ("to_out.0", DENSE),
    },
    convolution={"down": "conv", "up": "conv"},
)
