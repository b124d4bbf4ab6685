"""Names that config files of earlier versions use, and what they are called now."""

from typing import Any

KINDS = {
    "EDMScaling": "EDMPreconditioning",
    "BoundaryScaling": "ConsistencyPreconditioning",
    "TrigFlowScaling": "TrigFlowPreconditioning",
    "FlowScaling": "MeanFlowPreconditioning",
    "FixedRate": "ConstantTargetEMA",
    "AdaptiveRate": "AdaptiveTargetEMA",
    "Evaluating": "PeriodicEvaluation",
}
"""Former name of a class -> its name."""

FIELDS = {
    "scaling": "preconditioning",
    "law": "noise_distribution",
    "deviation": "std",
    "head_width": "head_dim",
    "multipliers": "channel_mult",
    "interval_clock": "interval_embedding",
    "rematerialise": "rematerialize",
    "most_skipped": "max_consecutive_skips",
    "points": "flow_matching_ratio",
    "regulariser": "regularizer",
}
"""Former name of a field, in whatever class -> its name."""

KIND_FIELDS = {
    "ADMUNet": {"width": "base_channels"},
    "SongUNet": {"width": "base_channels"},
    "Constant": {"levels": "num_levels"},
    "ConstantTargetEMA": {"rate": "decay"},
}
"""Class -> former names of its fields -> their names."""

VALUES = {"normalised": "normalized"}
"""Former value of a field of the U-Nets -> its value."""


def renamed(value: Any) -> Any:
    """Decoded JSON with the present names in place of former ones."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    kind = KINDS.get(kind, kind) if isinstance(kind, str) else ""
    names = FIELDS | KIND_FIELDS.get(kind, {})
    fields = {names.get(name, name): renamed(item) for name, item in value.items()}
    if kind:
        fields["kind"] = kind
    modulation = fields.get("modulation")
    if kind in ("ADMUNet", "SongUNet") and isinstance(modulation, str):
        fields["modulation"] = VALUES.get(modulation, modulation)
    return fields
