"""Configs of earlier versions: former names, and a layout that stated the noise schedule and N(k) in several places."""

import collections
import copy
from typing import Any

from cm_jax.diffusion.noise_schedule import NUM_LEVELS
from cm_jax.errors import InputError, indented_list

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

LEAVES = {"averages": "ema", "skipped_in_a_row": "consecutive_skips"}
"""Former name of a component of the training state -> its name."""


def renamed(value: Any, kind: str = "") -> Any:
    """Decoded JSON with the present names in place of former ones. `kind`: class of an object that does not name it."""
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if not isinstance(value, dict) or "module" in value:  # no former format holds components of other packages
        return value
    fields = dict(value)
    if isinstance(named := fields.get("kind"), str):
        kind = fields["kind"] = KINDS.get(named, named)
    names = FIELDS | KIND_FIELDS.get(kind, {})
    fields = {names.get(name, name): renamed(item) for name, item in fields.items()}
    if fields.get("modulation") == "normalised":
        fields["modulation"] = "normalized"
    return fields


def renamed_leaf(name: str) -> str:
    """Present name of a leaf of the training state, such as "ema/exponential_0.9999/stem/kernel"."""
    head, slash, rest = name.partition("/")
    return LEAVES.get(head, head) + slash + rest


_CURVES = {"KarrasCurve": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}}
_GRIDS = {"KarrasGrid": {"levels": 40} | _CURVES["KarrasCurve"]}
_CURRICULA = {
    "Constant": {"num_levels": 40},
    "Progressive": {"start": 2, "end": 200, "steps": 800_000},
    "Doubling": {"start": 10, "end": 1280, "steps": 400_000},
}
"""Curricula that define the N of a trained model, with their defaults."""
_OBJECTIVES = {
    "ConsistencyDistillation": "Constant",
    "ConsistencyTraining": "Progressive",
    "ImprovedConsistencyTraining": "Doubling",
}
"""Objectives whose curriculum defines the N of the trained model, with their default curriculum."""


def restated(fields: dict[str, Any]) -> dict[str, Any]:
    """Decoded JSON of a model or a run with every quantity stated once; the present layout does not change.

    Names must be the present ones. Raises InputError if two places state different values.
    """
    if "schedule" in fields:
        return fields
    fields = copy.deepcopy(fields)
    said: dict[str, dict[str, Any]] = collections.defaultdict(dict)  # quantity -> place in the config -> value
    grid = _complete(fields.pop("grid"), _GRIDS, "grid") if "grid" in fields else {}
    num_levels = grid.pop("levels", None)
    for quantity, value in grid.items():
        said[quantity]["grid"] = value
    preconditioning, objective = (_fields(fields.get(name)) for name in ("preconditioning", "objective"))
    if "sigma_min" in preconditioning:
        said["sigma_min"]["preconditioning"] = preconditioning.pop("sigma_min")
    if "curve" in objective:
        for quantity, value in _complete(objective.pop("curve"), _CURVES, "objective.curve").items():
            said[quantity]["objective.curve"] = value
    weighting = _fields(objective.get("weighting"))
    if "sigma_data" in weighting:
        said["sigma_data"]["preconditioning"] = preconditioning.get("sigma_data", 0.5)
        said["sigma_data"]["objective.weighting"] = weighting.pop("sigma_data")

    curriculum = _curriculum(objective)
    for place, target in ((f"{name}.curriculum", _fields(fields.get(name))) for name in ("target", "target_ema")):
        if "curriculum" in target:
            followed = _complete(target.pop("curriculum"), {"Progressive": _CURRICULA["Progressive"]}, place)
            said["the curriculum"][place] = followed | {"kind": "Progressive"}
            said["the curriculum"]["objective.curriculum"] = curriculum
    counts = curriculum or {}
    final = counts["end"] + 1 if isinstance(counts.get("end"), int) else counts.get("num_levels")
    if final is not None and num_levels is not None:
        said["the number of levels"] = {"objective.curriculum": final, "grid": num_levels}

    wrong = [
        f"{quantity}: " + ", ".join(f"{value} in {place}" for place, value in places.items())
        for quantity, places in said.items()
        if any(value != next(iter(places.values())) for value in places.values())
    ]
    if wrong:
        raise InputError(f"Expected one value of each quantity, got\n  {indented_list(wrong)}")
    schedule = {name: next(iter(said[name].values())) for name in _CURVES["KarrasCurve"] if name in said}
    if schedule:
        fields["schedule"] = {"kind": "KarrasSchedule"} | schedule
    follows = "objective" in fields and (final is not None or num_levels == NUM_LEVELS)
    if num_levels is not None and not follows:
        fields["num_levels"] = num_levels
    return fields


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _curriculum(objective: dict[str, Any]) -> dict[str, Any] | None:
    """The curriculum of an objective that defines the trained model's N, with its kind and all fields; else None."""
    default = _OBJECTIVES.get(str(objective.get("kind")))
    curriculum = objective.get("curriculum", {"kind": default})
    if default is None or _fields(curriculum).get("kind") == "Halving":
        return None
    return _complete(curriculum, _CURRICULA, "objective.curriculum") | {"kind": curriculum["kind"]}


def _complete(value: Any, kinds: dict[str, dict[str, Any]], place: str) -> dict[str, Any]:
    """The fields of an object of one of these kinds, with defaults for missing ones. Raises InputError for others."""
    kind = str(_fields(value).get("kind"))
    if kind not in kinds or set(value) - {"kind"} - set(kinds[kind]):
        expected = " or ".join(f"{name} with {', '.join(fields)}" for name, fields in kinds.items())
        raise InputError(f"{place} must be an object of kind {expected}; got {str(value)[:80]}.")
    return kinds[kind] | {name: field for name, field in value.items() if name != "kind"}
