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
    "most_corrupt": "max_corrupt",
    "regulariser": "regularizer",
}
"""Former name of a field, in whatever class -> its name."""

KIND_FIELDS = {
    "ADMUNet": {"width": "base_channels"},
    "SongUNet": {"width": "base_channels"},
    "Constant": {"levels": "num_levels"},
    "ConstantTargetEMA": {"rate": "decay"},
    "PeriodicEvaluation": {"average": "ema"},
    "TrainConfig": {
        "target": "target_ema",
        "start": "init_from",
        "averages": "ema_decay",
        "power_averages": "power_ema",
        "accumulate": "grad_accum_steps",
    },
}
"""Class -> former names of its fields -> their names."""

VALUES = {"modulation": {"normalised": "normalized"}}
"""Field, in whatever class -> former values -> their values."""

LEAVES = {"averages": "ema", "skipped_in_a_row": "consecutive_skips"}
"""Former name of a component of the training state -> its name."""


def renamed(value: Any, kind: str = "") -> Any:
    """Decoded JSON with the present names in place of former ones. `kind`: class of an object that does not name it."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    if isinstance(named := fields.get("kind"), str):
        kind = fields["kind"] = KINDS.get(named, named)
    names = FIELDS | KIND_FIELDS.get(kind, {})
    fields = {names.get(name, name): renamed(item) for name, item in fields.items()}
    for name, values in VALUES.items():
        if isinstance(fields.get(name), str):
            fields[name] = values.get(fields[name], fields[name])
    return fields


def renamed_leaf(name: str) -> str:
    """Present name of a leaf of the training state, such as "ema/exponential_0.9999/stem/kernel"."""
    head, slash, rest = name.partition("/")
    return LEAVES.get(head, head) + slash + rest
