"""Values of JSON files that others wrote, checked against the types that they must have."""

import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from cm_jax.errors import InputError, nearest

_LARGEST_WHOLE = 2**53
"""Of a whole number: beyond it programs that read JSON round."""
_LARGEST = 1e30
"""Of any number in a config: far beyond what one means, and far below where float32 ends."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; wanted: a JSON object.")
    return content


def check_value(value: Any, hint: Any, place: str) -> Any:
    """`value` as JSON has it, lists made tuples, if it is of the type `hint`: int, float, bool, str, Literal, X | None,
    tuple[X, ...] or tuple[X, Y]. Raises InputError that names `place`, what was wanted and what came.
    """
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in choices:
            return value
        wanted = "one of " + ", ".join(choices)
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in choices:
            return None
        return check_value(value, next(choice for choice in choices if choice is not type(None)), place)
    elif origin is tuple:
        parts = [choices[0]] * len(value) if choices[1:] == (...,) and isinstance(value, list) else list(choices)
        if isinstance(value, list) and len(value) == len(parts):
            pairs = enumerate(zip(value, parts, strict=True))
            return tuple(check_value(item, part, f"{place}[{index}]") for index, (item, part) in pairs)
        wanted = "a list" if choices[1:] == (...,) else f"a list of {len(choices)}"
    elif hint is bool:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif hint is str:
        if isinstance(value, str):
            return value
        wanted = "a text"
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_WHOLE:
            return value
        large = isinstance(value, int) and abs(value) >= _LARGEST_WHOLE
        wanted = "a whole number" + (" of less than 2^53" if large else "")
    else:
        assert hint is float, f"no check for {hint}"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and abs(value) < _LARGEST and math.isfinite(value):
            return value
        wanted = "a finite number"
    shown = json.dumps(value, default=repr)
    close = nearest(value, choices) if origin is Literal else ""
    raise InputError(f"{place} must be {wanted}, got {shown if len(shown) < 60 else shown[:56] + ' ...'}.{close}")
