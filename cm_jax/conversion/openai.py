"""State dicts of openai/consistency_models."""

import re

from cm_jax.conversion.rules import Layout, Shapes
from cm_jax.conversion.unet_format import UNetFormat
from cm_jax.networks.plan import Unit


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


OPENAI = _OpenAI(
    title="openai/consistency_models",
    input_layers={
        "embedding/dense_1": ("time_embed.0", Layout.DENSE),
        "embedding/dense_2": ("time_embed.2", Layout.DENSE),
        "embedding/table": ("label_emb", Layout.SAME),
        "stem": ("input_blocks.0.0", Layout.CONVOLUTION),
    },
    output_layers={"head/norm": ("out.0", Layout.SAME), "head/output": ("out.2", Layout.CONVOLUTION)},
    residual={
        "norm_1": ("in_layers.0", Layout.SAME),
        "conv_1": ("in_layers.2", Layout.CONVOLUTION),
        "embedding": ("emb_layers.1", Layout.DENSE),
        "norm_2": ("out_layers.0", Layout.SAME),
        "conv_2": ("out_layers.3", Layout.CONVOLUTION),
        "skip": ("skip_connection", Layout.POINTWISE),
    },
    attention={
        "norm": ("norm", Layout.SAME),
        "qkv": ("qkv", Layout.POINTWISE),
        "projection": ("proj_out", Layout.POINTWISE),
    },
    convolution={"down": "op", "up": "conv"},
)
