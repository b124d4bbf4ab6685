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
}
"""Former name of a field, in whatever class -> its name."""


def renamed(value: Any) -> Any:
    """Decoded JSON with the present names in place of former ones."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = {FIELDS.get(name, name): renamed(item) for name, item in value.items()}
    if isinstance(fields.get("kind"), str):
        fields["kind"] = KINDS.get(fields["kind"], fields["kind"])
    return fields
