"""Validation of values from JSON files against type hints."""

import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from cm_jax.errors import InputError, nearest

_LARGEST_WHOLE = 2**53
"""Limit of integers; JSON readers may round larger ones."""
_LARGEST = 1e30
"""Limit of numbers in a config, far below the largest float32."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with or without a byte-order mark. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} contains a {type(content).__name__}, expected a JSON object.")
    return content


def check_value(value: Any, hint: Any, place: str) -> Any:
    """`value` with lists as tuples, if it has the type `hint`.

    hint: int, float, bool, str, Literal, X | None, tuple[X, ...], tuple[X, Y] or int | tuple[int, int]. Raises
    InputError with `place`, the expected type and the value.
    """
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in choices:
            return value
        expected = "one of " + ", ".join(choices)
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in choices:
            return None
        kinds = sorted(choices, key=lambda choice: (typing.get_origin(choice) is tuple) != isinstance(value, list))
        return check_value(value, next(choice for choice in kinds if choice is not type(None)), place)
    elif origin is tuple:
        parts = [choices[0]] * len(value) if choices[1:] == (...,) and isinstance(value, list) else list(choices)
        if isinstance(value, list) and len(value) == len(parts):
            pairs = enumerate(zip(value, parts, strict=True))
            return tuple(check_value(item, part, f"{place}[{index}]") for index, (item, part) in pairs)
        expected = "a list" if choices[1:] == (...,) else f"a list of {len(choices)}"
    elif hint in (bool, str):
        if isinstance(value, hint):
            return value
        expected = "true or false" if hint is bool else "a text"
    else:
        assert hint in (int, float), f"no check for {hint}"
        kind, limit = (int, _LARGEST_WHOLE) if hint is int else (int | float, _LARGEST)
        number = isinstance(value, kind) and not isinstance(value, bool)
        if number and abs(value) < limit:  # false for NaN
            return value
        large = " of less than 2^53" if number else ""
        expected = f"a whole number{large}" if hint is int else "a finite number"
    shown = json.dumps(value, default=repr)
    close = nearest(value, choices) if origin is Literal else ""
    raise InputError(f"{place} must be {expected}, got {shown if len(shown) < 60 else shown[:56] + ' ...'}.{close}")
