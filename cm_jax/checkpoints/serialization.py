"""Settings, which are trees of frozen dataclasses, as JSON and back.

A part is written {"kind": the name of its class, and its fields}, a tuple as a list. Nothing is imported by name and no
code is run: a field may hold the concrete dataclasses at or below the class that its annotation names, and no other.
"""

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from cm_jax.checkpoints.former_layout import restated
from cm_jax.checkpoints.former_names import renamed
from cm_jax.errors import InputError, nearest
from cm_jax.io.validation import check_value

T = TypeVar("T")


def kinds(hint: Any) -> dict[str, type]:
    """The classes that a field of this type may hold, by name: none where it holds plain values."""
    found: dict[str, type] = {}
    for choice in _choices(hint):
        for kind in _family(choice):
            concrete = not inspect.isabstract(kind) and kind.__name__[0] != "_"
            if concrete and "kind" not in hints(kind) and all(map(_storable, hints(kind).values())):
                found.setdefault(kind.__name__, kind)
    return found


def may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def several(hint: Any) -> Any:
    """X, where the field is a tuple[X, ...] of parts; else None."""
    arguments = typing.get_args(hint)
    return arguments[0] if typing.get_origin(hint) is tuple and kinds(arguments[0]) else None


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The fields with which a dataclass is made, and their types."""
    resolved = typing.get_type_hints(kind)
    return {field.name: resolved[field.name] for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]


def encode(settings: Any, place: str = "") -> dict[str, Any]:
    """What `decode` makes the same settings of. Raises InputError for values that it would refuse."""
    return {"kind": type(settings).__name__} | encode_fields(settings, place)


def encode_fields(settings: Any, place: str = "") -> dict[str, Any]:
    """The same without the kind."""
    return {
        name: _encoded(getattr(settings, name), hint, within(place, name))
        for name, hint in hints(type(settings)).items()
    }


def fresh(kind: type) -> dict[str, Any]:
    """A part of this kind, encoded, with the defaults of its class; a field that has none is left out."""
    known, part = hints(kind), {"kind": kind.__name__}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if _has_default(field):
            default = field.default_factory() if callable(field.default_factory) else field.default
            part[field.name] = _encoded(default, known[field.name], field.name)
    return part


def decode(value: Any, hint: Any, place: str = "") -> Any:
    """A value for a field of type `hint`, from what JSON has for it; `place` names it in messages.

    A field that is missing is what its class makes it by default, so that older files can be read. Raises InputError
    for anything that does not fit, a name of a field or kind that is unknown among it.
    """
    named, part = kinds(hint), several(hint)
    if part is not None and isinstance(value, list):
        return tuple(decode(item, part, f"{place}[{index}]") for index, item in enumerate(value))
    if part is not None:
        raise InputError(f"{place} must be a list, got {json.dumps(value)[:60]}.")
    if not named:
        return check_value(value, hint, place)
    if value is None and may_be_none(hint):
        return None
    fields = dict(value) if isinstance(value, dict) else {}
    kind = fields.pop("kind", None)
    if kind not in list(named):
        wanted = " or ".join(named) + (", or null" if may_be_none(hint) else "")
        got = f", got {kind!r}" if isinstance(kind, str) else ""
        raise InputError(f"{place or 'it'} must be an object whose kind is {wanted}{got}.{nearest(kind, named)}")
    return decode_fields(fields, named[kind], place)


def decode_fields(fields: dict[str, Any], kind: type[T], place: str = "") -> T:
    """The same for an object that does not name its kind."""
    known = hints(kind)
    for name in fields:
        if name not in known:
            hint = nearest(name, known) or f" Its fields are {', '.join(known) or 'none'}."
            raise InputError(f"{place or 'it'} has no field {name!r}.{hint}")
    defaults = {field.name for field in dataclasses.fields(kind) if _has_default(field)}  # type: ignore[arg-type]
    values = {
        name: decode(fields.get(name), hint, within(place, name))
        for name, hint in known.items()
        if name in fields or name not in defaults
    }
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}" if place else str(error)) from error


def to_text(settings: Any, version: int) -> str:
    """A file of settings: JSON with the version of its format."""
    return json.dumps({"format": version, **encode_fields(settings)}, indent=2) + "\n"


def from_text(text: str, kind: type[T], version: int, source: str, what: str) -> T:
    """The inverse of `to_text`. `source` names the file, and `what` what it should be, in the InputError that a bad one
    raises."""
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
        return decode_fields(restated(renamed(fields)), kind)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{source} is not {what}: its parts lie too deep in each other.") from error


def differences(old: Any, new: Any, place: str = "", there: str = "in the folder") -> list[str]:
    """What differs between two encoded settings, a line for every value; `there` is where the old one lies."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        return [
            line
            for name in {**old, **new}
            for line in differences(old.get(name), new.get(name), within(place, name), there)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(map(_is_part, old + new)):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{place}[{index}]", there)]
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return []
    return [f"{place}: {_in_words(old)} {there}, {_in_words(new)} now"]


def within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _encoded(value: Any, hint: Any, place: str) -> Any:
    if dataclasses.is_dataclass(value):
        if kinds(hint).get(type(value).__name__) is not type(value):
            wanted = " or ".join(kinds(hint)) or "a plain value"
            raise InputError(f"{place} is a {type(value).__name__}, and files can hold {wanted} there.")
        return encode(value, place)
    part = several(hint)
    if part is not None:
        return [_encoded(item, part, f"{place}[{index}]") for index, item in enumerate(value)]
    plain = _listed(value)
    if value is not None or not kinds(hint):
        check_value(plain, hint, place)
    return plain


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def _choices(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _family(hint: Any) -> Iterator[type]:
    """The dataclasses at and below a class."""
    if not isinstance(hint, type) or hint in (int, float, bool, str, object, type(None)):
        return
    if "__dataclass_fields__" in vars(hint):  # not those of its bases
        yield hint
    for kind in type.__subclasses__(hint):
        yield from _family(kind)


def _storable(hint: Any) -> bool:
    """Whether a file can hold a field of this type; a distance that is made of functions, for one, it cannot."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple or len(_choices(hint)) > 1:
        return all(_storable(argument) for argument in arguments if argument is not ...)
    return origin is Literal or hint in (int, float, bool, str, type(None)) or next(_family(hint), None) is not None


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _is_part(value: Any) -> bool:
    return isinstance(value, dict)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "an object"))
    if isinstance(value, list) and any(map(_is_part, value)):
        return ", ".join(map(_in_words, value))
    return json.dumps(value)
