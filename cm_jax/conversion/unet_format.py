"""State dicts of the ADM U-Net in PyTorch: tensor names of both formats, rules, and inference of the architecture.

A format yields the rules of any network, and the architecture of any file: the depth from the names of its tensors, the
widths from their shapes.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from cm_jax.conversion.rules import Layout, Rule, Shapes
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.networks.unet_config import Unit

_LAYERS = {
    "embedding/dense_1": (Layout.DENSE, "time_embed.0", "time_embedding.linear_1"),
    "embedding/dense_2": (Layout.DENSE, "time_embed.2", "time_embedding.linear_2"),
    "embedding/table": (Layout.SAME, "label_emb", "class_embedding"),
    "stem": (Layout.CONVOLUTION, "input_blocks.0.0", "conv_in"),
    "norm_1": (Layout.SAME, "in_layers.0", "norm1"),
    "conv_1": (Layout.CONVOLUTION, "in_layers.2", "conv1"),
    "embedding": (Layout.DENSE, "emb_layers.1", "time_emb_proj"),
    "norm_2": (Layout.SAME, "out_layers.0", "norm2"),
    "conv_2": (Layout.CONVOLUTION, "out_layers.3", "conv2"),
    "skip": (Layout.POINTWISE, "skip_connection", "conv_shortcut"),
    "norm": (Layout.SAME, "norm", "group_norm"),
    "qkv": (Layout.POINTWISE, "qkv", "to_q to_k to_v"),
    "projection": (Layout.POINTWISE, "proj_out", "to_out.0"),
    "down": (Layout.CONVOLUTION, "op", "conv"),
    "up": (Layout.CONVOLUTION, "conv", "conv"),
    "head/norm": (Layout.SAME, "out.0", "conv_norm_out"),
    "head/output": (Layout.CONVOLUTION, "out.2", "conv_out"),
}
"""Layers of cm_jax/networks: layout of the weight, and name in openai/consistency_models and in diffusers. Layers of
units are named within their unit. A layer with several names is split in the source."""
_UNITS = {
    "residual": ("norm_1", "conv_1", "embedding", "norm_2", "conv_2", "skip"),
    "attention": ("norm", "qkv", "projection"),
}


@dataclasses.dataclass(frozen=True)
class UNetFormat:
    """One PyTorch format."""

    title: str
    names: dict[str, str]
    """Source name of each layer."""
    attention_layout: Layout
    """Layout of qkv and projection."""

    def unit(self, stage: str, block: int, position: int, unit: Unit, blocks_per_level: int) -> str:
        """Source prefix of a unit: number `position` of block `block` in the encoder, middle or decoder."""
        raise NotImplementedError

    def depth(self, shapes: Shapes) -> tuple[int, int]:
        """(levels, blocks per level), inferred from the tensor names."""
        raise NotImplementedError

    def rules(self, network: ADMUNet) -> list[Rule]:
        """Rules of all parameters of `network`, in the order of OpenAI's state dict.

        Raises InputError for networks with features that PyTorch formats lack.
        """
        lacking = {
            "an interval embedding": network.interval_embedding,
            "a guidance embedding": network.guidance_embedding,
            "normalized modulation": network.modulation == "normalized",
            "the variant edm": network.variant == "edm",
            "augmentation parameters": network.augment_dim,
            "an uncertainty head": network.uncertainty,
            "other output channels than image channels": network.head_channels != network.image_channels,
        }
        if features := [name for name, used in lacking.items() if used]:
            raise InputError(f"The {self.title} format has no networks with {' or '.join(features)}; use --to native.")
        return list(self._rules(network))

    def _rules(self, network: ADMUNet) -> Iterator[Rule]:
        def layer(path: str, kind: str, prefix: str = "") -> Iterator[Rule]:
            layout = self.attention_layout if kind in ("qkv", "projection") else _LAYERS[kind][0]
            names = [prefix + name for name in self.names[kind].split()]
            leaf = "" if kind == "embedding/table" else "/scale" if "norm" in kind else "/kernel"
            yield Rule(path + leaf, tuple(f"{name}.weight" for name in names), layout)
            if leaf:
                yield Rule(f"{path}/bias", tuple(f"{name}.bias" for name in names), Layout.SAME)

        for path in ("embedding/dense_1", "embedding/dense_2", "embedding/table", "stem"):
            if path != "embedding/table" or network.classes is not None:
                yield from layer(path, path)
        for path, unit, prefix in self.units(network):
            if unit.kind == "convolution":
                assert unit.resample is not None
                yield from layer(path, unit.resample, f"{prefix}.")
                continue
            for kind in _UNITS[unit.kind]:
                if kind != "skip" or unit.channels_in != unit.channels_out:
                    yield from layer(f"{path}/{kind}", kind, f"{prefix}.")
        for path in ("head/norm", "head/output"):
            yield from layer(path, path)

    def units(self, network: ADMUNet) -> list[tuple[str, Unit, str]]:
        """(parameter path, unit, source prefix) of every unit, in order."""
        plan = network.plan()
        stages = {"encoder": plan.encoder, "middle": (plan.middle,), "decoder": plan.decoder}
        return [
            (f"{block.name}/{unit.name}", unit, self.unit(stage, index, position, unit, network.blocks_per_level))
            for stage, blocks in stages.items()
            for index, block in enumerate(blocks)
            for position, unit in enumerate(block.units)
        ]

    def infer(self, shapes: Shapes, source: str, **known: Any) -> ADMUNet:
        """The network with tensors of these names and shapes; `known` gives the fields that shapes do not determine.

        Raises InputError where the tensors are not those of an ADM U-Net. A few missing or damaged tensors are not
        reported here: `from_source` reports them all together.
        """
        unknown = InputError(
            f"Expected the weights of a consistency model or of its EDM teacher in {source}: an ADM U-Net in the "
            f"{self.title} format; got {len(shapes)} tensors, starting with {', '.join(list(shapes)[:3])}."
        )

        def size(axis: int, *names: str) -> int:
            """Size of the axis in the first of these tensors that is present."""
            for name in names:
                if name in shapes and len(shapes[name]) > axis and shapes[name][axis] > 0:
                    return shapes[name][axis]
            raise unknown

        def present(prefix: str) -> bool:
            return any(name.startswith(f"{prefix}.") for name in shapes)

        def encoder_unit(block: int, position: int, unit: Unit) -> str:
            return self.unit("encoder", block, position, unit, blocks_per_level)

        width = size(1, f"{self.names['embedding/dense_1']}.weight")
        levels, blocks_per_level = self.depth(shapes)
        if not 0 < levels * blocks_per_level < len(shapes):
            raise unknown
        channels, attention_factors, modulated = [], [], 0
        for level in range(levels):
            block = level * (blocks_per_level + 1)
            residual = encoder_unit(block, 0, Unit("residual", "", 0, 0))
            inside = {layer: f"{residual}.{self.names[layer]}" for layer in _UNITS["residual"]}
            first = (f"{inside['norm_2']}.weight", f"{inside['conv_2']}.bias", f"{inside['conv_1']}.bias")
            channels.append(size(0, *first))
            embedding = inside["embedding"]
            modulated = modulated or size(0, f"{embedding}.bias", f"{embedding}.weight") // channels[0]
            if present(f"{encoder_unit(block, 1, Unit('attention', '', 0, 0))}.{self.names['norm']}"):
                attention_factors.append(2**level)

        downsample = encoder_unit(blocks_per_level, 0, Unit("convolution", "downsample", 0, 0, "down"))
        output, table = self.names["head/output"], f"{self.names['embedding/table']}.weight"
        image_channels = size(1, f"{self.names['stem']}.weight")
        output_channels = size(0, f"{output}.bias", f"{output}.weight")
        if output_channels == 2 * image_channels:
            raise InputError(
                f"Expected {image_channels} output channels in {source}, got {output_channels}: a diffusion model with "
                "learned variances (learn_sigma); use a consistency model or an EDM teacher."
            )
        fields = {
            "image_channels": image_channels,
            "base_channels": width,
            "channel_mult": tuple(count / width if count % width else count // width for count in channels),
            "blocks_per_level": blocks_per_level,
            "attention_factors": tuple(attention_factors),
            "classes": size(0, table) if table in shapes else None,
            "modulation": "scale_shift" if modulated == 2 else "additive",
            "resampling": "convolution" if present(f"{downsample}.{self.names['down']}") else "residual",
        }
        try:
            return ADMUNet(**fields, **known)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


class _OpenAI(UNetFormat):
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


class _Diffusers(UNetFormat):
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
    "openai/consistency_models", {layer: name for layer, (_, name, _) in _LAYERS.items()}, Layout.POINTWISE
)
DIFFUSERS = _Diffusers("diffusers", {layer: name for layer, (_, _, name) in _LAYERS.items()}, Layout.DENSE)
