"""State dicts of the ADM U-Net in PyTorch: tensor names, rules, and inference of the architecture.

A `UNetFormat` is a table of names. It yields the rules of any network, and the architecture of any file: the depth from
the names of its tensors, the widths from their shapes.
"""

import dataclasses
from typing import Any

from cm_jax.conversion.rules import Layout, Rule, Shapes
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.networks.layers import Resample
from cm_jax.networks.plan import Unit

Layer = tuple[str | tuple[str, ...], Layout]
"""Names of a layer in the source (several where the source splits it), and the layout of its weight."""


@dataclasses.dataclass(frozen=True)
class UNetFormat:
    """Names of one PyTorch format; keys are the layers of cm_jax/networks, in the order of the source's state dict."""

    title: str
    input_layers: dict[str, Layer]
    output_layers: dict[str, Layer]
    residual: dict[str, Layer]
    attention: dict[str, Layer]
    convolution: dict[Resample, str]
    """Name of the convolution inside a resampling unit that is not a residual block."""

    def unit(self, stage: str, block: int, position: int, unit: Unit, blocks_per_level: int) -> str:
        """Source prefix of a unit: number `position` of block `block` in the encoder, middle or decoder."""
        raise NotImplementedError

    def depth(self, shapes: Shapes) -> tuple[int, int]:
        """(levels, blocks per level), inferred from the tensor names."""
        raise NotImplementedError

    def rules(self, network: ADMUNet) -> list[Rule]:
        """Rules of all parameters of `network`, in the order of the source's state dict.

        Raises InputError for networks with normalized modulation or interval embedding, which PyTorch formats lack.
        """
        unsupported = {
            "an interval embedding": network.interval_embedding,
            "normalized modulation": network.modulation == "normalized",
        }
        for feature, used in unsupported.items():
            if used:
                raise InputError(f"The {self.title} format has no networks with {feature}; use --to native.")
        rules: list[Rule] = []

        def add(path: str, layer: Layer, prefix: str = "") -> None:
            names, layout = layer
            sources = tuple(prefix + name for name in ([names] if isinstance(names, str) else names))
            if path.endswith("/table"):
                rules.append(Rule(path, tuple(f"{name}.weight" for name in sources), layout))
                return
            weight = "scale" if path.split("/")[-1].startswith("norm") else "kernel"
            rules.append(Rule(f"{path}/{weight}", tuple(f"{name}.weight" for name in sources), layout))
            rules.append(Rule(f"{path}/bias", tuple(f"{name}.bias" for name in sources), Layout.SAME))

        for path, layer in self.input_layers.items():
            if path != "embedding/table" or network.classes is not None:
                add(path, layer)
        for path, unit, prefix in self.units(network):
            if unit.kind == "convolution":
                assert unit.resample is not None
                add(path, (self.convolution[unit.resample], Layout.CONVOLUTION), f"{prefix}.")
                continue
            for layer_name, layer in (self.residual if unit.kind == "residual" else self.attention).items():
                if layer_name != "skip" or unit.channels_in != unit.channels_out:
                    add(f"{path}/{layer_name}", layer, f"{prefix}.")
        for path, layer in self.output_layers.items():
            add(path, layer)
        return rules

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

        dense_1, stem, table = (
            _name(self.input_layers[layer]) for layer in ("embedding/dense_1", "stem", "embedding/table")
        )
        output = _name(self.output_layers["head/output"])
        width = size(1, f"{dense_1}.weight")
        levels, blocks_per_level = self.depth(shapes)
        if not 0 < levels * blocks_per_level < len(shapes):
            raise unknown

        def encoder_unit(block: int, position: int, unit: Unit) -> str:
            return self.unit("encoder", block, position, unit, blocks_per_level)

        channels, attention_factors, modulated = [], [], 0
        for level in range(levels):
            block = level * (blocks_per_level + 1)
            residual = encoder_unit(block, 0, Unit("residual", "", 0, 0))
            inside = {layer: f"{residual}.{_name(names)}" for layer, names in self.residual.items()}
            first = (f"{inside['norm_2']}.weight", f"{inside['conv_2']}.bias", f"{inside['conv_1']}.bias")
            channels.append(size(0, *first))
            embedding = (f"{inside['embedding']}.bias", f"{inside['embedding']}.weight")
            modulated = modulated or size(0, *embedding) // channels[0]
            if present(f"{encoder_unit(block, 1, Unit('attention', '', 0, 0))}.{_name(self.attention['norm'])}"):
                attention_factors.append(2**level)

        downsample = encoder_unit(blocks_per_level, 0, Unit("convolution", "downsample", 0, 0, "down"))
        image_channels, output_channels = size(1, f"{stem}.weight"), size(0, f"{output}.bias", f"{output}.weight")
        if output_channels == 2 * image_channels:
            raise InputError(
                f"Expected {image_channels} output channels in {source}, got {output_channels}: a diffusion model with "
                "learned variances (learn_sigma); use a consistency model or an EDM teacher."
            )
        fields = {
            "image_channels": image_channels,
            "base_channels": width,
            "channel_mult": tuple(_int_if_whole(count / width) for count in channels),
            "blocks_per_level": blocks_per_level,
            "attention_factors": tuple(attention_factors),
            "classes": size(0, f"{table}.weight") if f"{table}.weight" in shapes else None,
            "modulation": "scale_shift" if modulated == 2 else "additive",
            "resampling": "convolution" if present(f"{downsample}.{self.convolution['down']}") else "residual",
        }
        try:
            return ADMUNet(**fields, **known)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def _name(layer: Layer) -> str:
    """The first source name of a layer."""
    return layer[0] if isinstance(layer[0], str) else layer[0][0]


def _int_if_whole(number: float) -> float:
    return int(number) if number == int(number) else number
