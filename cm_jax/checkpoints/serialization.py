"""Configurations (trees of frozen dataclasses) as JSON and back.

A component is written as {"kind": class name, field: value, ...} and a tuple as a list. Nothing is imported by name: a
field accepts the dataclasses that its annotation lists (`distance: Squared | PseudoHuber`), and no others. An abstract
class in the annotation (`Squared | Distance`) stands for the registered classes derived from it, whose objects also
hold the name of their "module".
"""

import dataclasses
import functools
import json
import typing
from typing import Any, TypeVar

import numpy as np

from cm_jax.checkpoints import registry
from cm_jax.checkpoints.former_format import renamed, restated
from cm_jax.errors import InputError, nearest, one_line
from cm_jax.io.validation import check_value

T = TypeVar("T")
HIDDEN = {"hidden": True}
"""Metadata of a field that files hold and command lines do not."""


def kinds(hint: Any) -> dict[str, type]:
    """The dataclasses that an annotation admits, by name; empty for plain values."""
    members = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type)]
    abstract = [kind for kind in members if registry.is_abstract(kind)]
    listed = {kind.__name__: kind for kind in members if dataclasses.is_dataclass(kind) and kind not in abstract}
    others = {name: kind for base in abstract for name, kind in registry.registered(base).items()}
    return listed | others


def may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    resolved = typing.get_type_hints(kind)
    return {field.name: resolved[field.name] for field in dataclasses.fields(kind)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or dataclasses.MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def encode(config: Any, place: str = "") -> dict[str, Any]:
    """The JSON value from which `decode` restores `config`. Raises InputError for values that it would reject."""
    kind = type(config)
    fields = {name: _encoded(getattr(config, name), hint, within(place, name)) for name, hint in hints(kind).items()}
    module = registry.origin(kind)
    return {"kind": kind.__name__} | ({} if module is None else {"module": module}) | fields


def decode(value: Any, hint: Any, place: str = "") -> Any:
    """The value of a field of type `hint` from JSON; `place` names the field in messages.

    Missing fields take their defaults. Raises InputError for anything else that does not fit.
    """
    choices = kinds(hint)
    if not choices or (value is None and may_be_none(hint)):
        return check_value(value, hint, place)
    fields = dict(value) if isinstance(value, dict) else {}
    found = fields.pop("kind", None)
    known = choices.get(found) if isinstance(found, str) else None
    module = fields.pop("module", None) if known is None or registry.origin(known) else None
    if known is None:
        if isinstance(found, str) and isinstance(module, str):
            raise InputError(_unregistered(found, module, place))
        wanted = " or ".join(choices) + (", or null" if may_be_none(hint) else "")
        got = f", got {found!r}" if isinstance(found, str) else ""
        raise InputError(f"{place or 'it'} must be an object whose kind is {wanted}{got}.{nearest(found, choices)}")
    kind, expected = known, hints(known)
    for name in fields:
        if name not in expected:
            advice = nearest(name, expected) or f" Its fields are {', '.join(expected) or 'none'}."
            raise InputError(f"{place or 'it'} has no field {name!r}.{advice}")
    required = {field.name for field in dataclasses.fields(kind) if default_of(field) is dataclasses.MISSING}
    given = [name for name in expected if name in fields or name in required]
    values = {name: decode(fields.get(name), expected[name], within(place, name)) for name in given}
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}" if place else str(error)) from error


def to_text(config: Any, version: int) -> str:
    """A configuration file: JSON with the version of its format."""
    fields = encode(config)
    del fields["kind"]
    return json.dumps({"format": version, **fields}, indent=2) + "\n"


def from_text(text: str, kind: type[T], version: int, source: str, what: str) -> T:
    """The inverse of `to_text`. Raises InputError; `source` names the file and `what` its expected content."""
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict) or "format" not in fields:
            raise ValueError("it has no format")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not {what}: {error}.") from error
    found = fields.pop("format")
    if found != version or not isinstance(found, int):
        newer = isinstance(found, int) and found > version
        advice = "upgrade cm_jax" if newer else "it is damaged, or of another program"
        raise InputError(f"{source} has format {found!r}; this version reads format {version}: {advice}.")
    try:
        return decode({"kind": kind.__name__} | restated(renamed(fields, kind.__name__)), kind)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{source} is not {what}: it is nested too deeply.") from error


def differences(old: Any, new: Any, place: str = "", there: str = "in the folder") -> list[str]:
    """One line for each value that differs between two encoded configurations; `there` says where the old one is."""
    found = changed_values(old, new, place).items()
    return [f"{name}: {in_words(before)} {there}, {in_words(now)} now" for name, (before, now) in found]


def changed_values(old: Any, new: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """{"optimizer.beta1": (old value, new value)} for each value that differs between two encoded configurations."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        pairs = ((old.get(name), new.get(name), within(place, name)) for name in {**old, **new})
        return {name: values for pair in pairs for name, values in changed_values(*pair).items()}
    return {} if old == new and isinstance(old, bool) == isinstance(new, bool) else {place: (old, new)}


def within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _encoded(value: Any, hint: Any, place: str) -> Any:
    if not dataclasses.is_dataclass(value):
        plain = _as_lists(value)
        if value is not None or not kinds(hint):
            check_value(plain, hint, place)
        return plain
    if kinds(hint).get(type(value).__name__) is not type(value):
        wanted, name = " or ".join(kinds(hint)) or "a plain value", type(value).__name__
        advice = ""
        if any(registry.is_abstract(base) and isinstance(value, base) for base in typing.get_args(hint)):
            advice = f" To save a component of your own, register its class: cm_jax.register({name})."
        raise InputError(f"{place} is a {name}, and files can hold {wanted} there.{advice}")
    return encode(value, place)


def _unregistered(kind: str, module: str, place: str) -> str:
    """The message for a component of another package, whose name and module a file states."""
    kind, module = one_line(kind), module if module.replace(".", "").isidentifier() else one_line(module)
    return (
        f"unknown {place.rpartition('.')[2] or 'component'} {kind}, saved from the module {module}: import that "
        f"module, which registers it, before loading (on the command line: --import {module})."
    )


def check_types(config: Any) -> None:
    """Raise InputError for plain values of the wrong type, which a constructor does not check."""
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if not kinds(hint):
            check_value(_as_lists(value), hint, name)
        elif isinstance(value, str | int | float | list | tuple | dict):
            raise InputError(f"{name} must be {' or '.join(kinds(hint))}, got {value!r}.")


def _as_lists(value: Any) -> Any:
    """The value with lists for tuples, and Python's numbers for NumPy's."""
    if isinstance(value, tuple | list):
        return [_as_lists(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def in_words(value: Any) -> str:
    """A value of an encoded configuration: of a component, its kind."""
    return str(value.get("kind", "an object")) if isinstance(value, dict) else json.dumps(value)
