"""Run-time checks of array shapes in the tests: beartype on what is annotated with jaxtyping's arrays.

Everything else is left to pyright, because checks of every call took 16 % of the CPU time of the tests.
"""

import dataclasses
import inspect
import typing
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""The type checker, with an int accepted where a float is asked for."""


def install() -> None:
    """Check cm_jax from its import on."""
    everything = jaxtyping.jaxtyped

    def selective(*, typechecker: Any) -> Any:
        return lambda item: everything(item, typechecker=typechecker) if _has_arrays(item) else item

    jaxtyping.jaxtyped = selective  # what jaxtyping's import hook puts before functions and classes
    jaxtyping.install_import_hook("cm_jax", f"{__name__}.checked")


def _has_arrays(item: Any) -> bool:
    """Whether a function, or the __init__ of a dataclass, takes or returns annotated arrays."""
    if inspect.isclass(item):
        annotations = [field.type for field in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else []
    else:
        function = getattr(item, "fget", None) or getattr(item, "__func__", item)
        annotations = getattr(function, "__annotations__", {}).values()
    return any(_mentions_array(annotation) for annotation in annotations)


def _mentions_array(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    return any(_mentions_array(part) for part in parts)
