"""Configs of the first layout, which stated the noise schedule, sigma_data and N(k) in several places."""

import copy
from typing import Any

from cm_jax.diffusion.noise_schedule import NUM_LEVELS
from cm_jax.errors import InputError, indented_list

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

Statements = dict[str, dict[str, Any]]
"""Quantity -> place in the config -> its value there."""


def restated(fields: dict[str, Any]) -> dict[str, Any]:
    """Decoded JSON of a model or a run with every quantity stated once; the present layout does not change.

    Names must be the present ones. Raises InputError if two places state different values.
    """
    if "schedule" in fields:
        return fields
    fields = copy.deepcopy(fields)
    said: Statements = {}
    grid = _complete(fields.pop("grid"), _GRIDS, "grid") if "grid" in fields else {}
    num_levels = grid.pop("levels", None)
    _state(said, "grid", grid)
    preconditioning, objective = (_fields(fields.get(name)) for name in ("preconditioning", "objective"))
    if "sigma_min" in preconditioning:
        _state(said, "preconditioning", {"sigma_min": preconditioning.pop("sigma_min")})
    if "curve" in objective:
        _state(said, "objective.curve", _complete(objective.pop("curve"), _CURVES, "objective.curve"))
    weighting = _fields(objective.get("weighting"))
    if "sigma_data" in weighting:
        _state(said, "preconditioning", {"sigma_data": preconditioning.get("sigma_data", 0.5)})
        _state(said, "objective.weighting", {"sigma_data": weighting.pop("sigma_data")})

    curriculum = _curriculum(objective)
    for name in ("target", "target_ema"):
        target = _fields(fields.get(name))
        if "curriculum" in target:
            progressive = {"Progressive": _CURRICULA["Progressive"]}
            followed = _complete(target.pop("curriculum"), progressive, f"{name}.curriculum")
            _state(said, f"{name}.curriculum", {"the curriculum": followed | {"kind": "Progressive"}})
            _state(said, "objective.curriculum", {"the curriculum": curriculum})
    final = _final_num_levels(curriculum)
    if final is not None:
        _state(said, "objective.curriculum", {"the number of levels": final})
        _state(said, "grid", {} if num_levels is None else {"the number of levels": num_levels})

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
    is_run = "objective" in fields
    if num_levels is not None and not (is_run and (final is not None or num_levels == NUM_LEVELS)):
        fields["num_levels"] = num_levels
    return fields


def _state(said: Statements, place: str, values: dict[str, Any]) -> None:
    for quantity, value in values.items():
        said.setdefault(quantity, {})[place] = value


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _curriculum(objective: dict[str, Any]) -> dict[str, Any] | None:
    """The curriculum of an objective that defines the trained model's N, with its kind and all fields; else None."""
    default = _OBJECTIVES.get(str(objective.get("kind")))
    curriculum = objective.get("curriculum", {"kind": default})
    if default is None or _fields(curriculum).get("kind") == "Halving":
        return None
    return _complete(curriculum, _CURRICULA, "objective.curriculum") | {"kind": curriculum["kind"]}


def _final_num_levels(curriculum: dict[str, Any] | None) -> int | None:
    """The last N of a complete curriculum; None without one, or for values that are not integers."""
    if curriculum is None:
        return None
    num_levels, end = curriculum.get("num_levels"), curriculum.get("end")
    return end + 1 if isinstance(end, int) else num_levels if isinstance(num_levels, int) else None


def _complete(value: Any, kinds: dict[str, dict[str, Any]], place: str) -> dict[str, Any]:
    """The fields of an object of one of these kinds, with defaults for missing ones. Raises InputError for others."""
    kind = str(_fields(value).get("kind"))
    if kind not in kinds or set(value) - {"kind"} - set(kinds[kind]):
        expected = " or ".join(f"{name} with {', '.join(fields)}" for name, fields in kinds.items())
        raise InputError(f"{place} must be an object of kind {expected}; got {str(value)[:80]}.")
    return kinds[kind] | {name: field for name, field in value.items() if name != "kind"}
