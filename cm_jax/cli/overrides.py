"""`PRESET --field value ...`: a tree of settings, any field of which can be set, any part exchanged for another kind.

The preset is encoded as JSON; the components that the command line names are exchanged in that tree; tyro reads
the rest through a form that is built after the tree; the result is decoded.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from cm_jax.checkpoints.serialization import decode, encode, fresh, hints, kinds, may_be_none, several
from cm_jax.cli.descriptions import descriptions
from cm_jax.cli.parsing import chosen, parsed, unknown_option
from cm_jax.errors import InputError, nearest
from cm_jax.io.validation import check_value

T = TypeVar("T")
O = TypeVar("O")  # noqa: E741

_ABOUT_KINDS = """Where an option's choices are kinds of a part, another kind comes with its own defaults, and with its
own options in place of the old one's, in any order on the line; the kind that is there already keeps its values.
--help after such an option shows what it brings."""


class Place(NamedTuple):
    """A field somewhere in a tree of settings."""

    path: tuple[str, ...]
    hint: Any
    holder: Any
    """The encoded part, or the list of parts, that holds it."""
    key: Any

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The kinds between which one can choose there; none for a plain value, or where there is only one."""
        named = kinds(several(self.hint) or self.hint)
        choices = (*named, "None") if may_be_none(self.hint) and named else tuple(named)
        return choices if len(choices) > 1 or self.empty else ()

    @property
    def empty(self) -> bool:
        """Whether it has no default and has not been given either."""
        return isinstance(self.holder, dict) and self.key not in self.holder


def parse(
    presets: Mapping[str, T | Callable[[], T]], options: O, prog: str, arguments: Sequence[str]
) -> tuple[str, T, O]:
    """(preset, settings, options): the settings of a preset, and `options`, which are no part of them, as the words of
    the command line change them.

    A preset is an instance of a frozen dataclass, or a function that makes one; its docstring is its help. Raises
    InputError for anything that cannot be; prints and exits where help is wanted.
    """
    name, preset, words = chosen(presets, "preset", f"{prog} PRESET [--field value ...]", arguments)
    settings: Any = preset() if callable(preset) else preset
    tree, extras = encode(settings), encode(options)
    words = _exchanged(tree, type(settings), words)
    flags = [place.flag for place in _options(tree, type(settings), extras, type(options))]
    form = dataclasses.make_dataclass(
        "Form",
        [
            ("options", Annotated[_form(extras, type(options)), tyro.conf.arg(name="")]),
            ("settings", Annotated[_form(tree, type(settings)), tyro.conf.arg(name="")]),
        ],
    )
    for word in words:
        _check_option(word, flags, tree, type(settings))
    description = f"{inspect.getdoc(preset)}\n\n{_ABOUT_KINDS}"
    given: Any = parsed(form, f"{prog} {name}", words, flags=flags, description=description)
    _fill(extras, type(options), given.options)
    _fill(tree, type(settings), given.settings)
    return name, decode(tree, type(settings)), decode(extras, type(options))


def _places(part: dict[str, Any], kind: type, above: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every field of an encoded part and of the parts in it, from the outside in."""
    for name, hint in hints(kind).items():
        path = (*above, name)
        yield Place(path, hint, part, name)
        held = part.get(name)
        if isinstance(held, dict):
            yield from _places(held, kinds(hint)[held["kind"]], path)
        if isinstance(held, list) and several(hint):
            for index, item in enumerate(held):
                yield Place((*path, str(index)), several(hint), held, index)
                yield from _places(item, kinds(several(hint))[item["kind"]], (*path, str(index)))


def _exchanged(tree: dict[str, Any], kind: type, words: Sequence[str]) -> list[str]:
    """Exchange the parts of `tree` that the words ask for; the words again, as tyro knows the names of kinds."""
    split = [word.partition("=")[::2] if word.startswith("--") and "=" in word else (word,) for word in words]
    result = list(itertools.chain.from_iterable(split))
    starts = [index for index, word in enumerate(result) if word.startswith("--")]
    for start in sorted(starts, key=lambda index: result[index].count(".")):
        path = tuple(result[start][2:].replace("-", "_").split("."))
        place = next((place for place in _places(tree, kind) if place.path == path), None)
        values = slice(start + 1, next((index for index in starts if index > start), len(result)))
        if place is None:
            continue
        if place.choices:
            result[values] = [_kind_named(word, place) for word in result[values]]
            _exchange(place, result[values])
        elif may_be_none(place.hint):
            result[values] = ["None" if word.lower() == "none" else word for word in result[values]]
    return result


def _kind_named(word: str, place: Place) -> str:
    """The kind that a word means, whatever its case, hyphens and underscores."""

    def plain(name: str) -> str:
        return name.lower().replace("-", "").replace("_", "")

    found = {plain(choice): choice for choice in place.choices}.get(plain(word))
    if found is None:
        hint = nearest(word, place.choices)
        raise InputError(f"{place.flag} must be one of {', '.join(place.choices)}, got {word!r}.{hint}")
    return found


def _exchange(place: Place, names: Sequence[str]) -> None:
    """Put parts of these kinds in a place; one that is there already, of the kind wanted, stays as it is."""
    part = several(place.hint)
    if part is None and len(names) != 1:
        raise InputError(f"{place.flag} needs one of {', '.join(place.choices)}.")
    old = None if place.empty else place.holder[place.key]
    if part is not None:
        pairs = itertools.zip_longest(names, (old or [])[: len(names)])
        place.holder[place.key] = [_part(part, name, item) for name, item in pairs]
    else:
        place.holder[place.key] = None if names[0] == "None" else _part(place.hint, names[0], old)


def _part(hint: Any, name: str, old: dict[str, Any] | None) -> dict[str, Any]:
    return old if old and old["kind"] == name else fresh(kinds(hint)[name])


def _options(tree: dict[str, Any], kind: type, extras: dict[str, Any], extra_kind: type) -> Iterator[Place]:
    """The places that have an option of their own."""
    for place in itertools.chain(_places(extras, extra_kind), _places(tree, kind)):
        if place.choices or not kinds(several(place.hint) or place.hint):
            yield place


def _check_option(word: str, flags: Sequence[str], tree: dict[str, Any], kind: type) -> None:
    """Raise InputError for an option that does not exist, with the kinds of the part that have it, if any do."""
    head, _, last = word[2:].replace("-", "_").rpartition(".")
    known = {word.replace("_", "-"), "--" + f"{head}.{last.removeprefix('no_')}".strip(".").replace("_", "-")}
    if not word.startswith("--") or word == "--help" or known & set(flags):
        return
    for place in _places(tree, kind):
        having = [name for name, choice in kinds(place.hint).items() if last in hints(choice)]
        if place.path == tuple(head.split(".")) and having:
            now = place.holder.get(place.key) if isinstance(place.holder, dict) else place.holder[place.key]
            raise InputError(
                f"There is no option {word}: {place.flag} is {now['kind'] if now else None} here. "
                f"It needs {place.flag} {' or '.join(having)}."
            )
    raise unknown_option(word, flags)


def _form(part: dict[str, Any], kind: type) -> Any:
    """A dataclass with the plain fields of an encoded part as they are, and options for the kinds of its parts."""
    fields: list[Any] = []
    texts = descriptions(kind)
    for name, hint in hints(kind).items():
        place, held, text = Place((name,), hint, part, name), part.get(name), texts.get(name)
        if place.choices:
            tell = {} if place.empty else {"default": _kind_names(held)}
            choice = Literal[place.choices]  # type: ignore[valid-type]
            shown = tuple[choice, ...] if several(hint) else choice  # type: ignore[valid-type]
            fields.append((f"{name}_KIND", Annotated[shown, tyro.conf.arg(name=name, help=text)], _field(**tell)))
        if isinstance(held, dict):
            fields.append((name, _form(held, kinds(hint)[held["kind"]])))
        elif isinstance(held, list) and several(hint):
            fields.append((name, _list_form(held, several(hint))))
        elif not kinds(several(hint) or hint):
            tell = {} if place.empty else {"default": check_value(held, hint, name)}
            fields.append((name, Annotated[hint, tyro.conf.arg(help=text)], _field(**tell)))
    form = dataclasses.make_dataclass("Form", fields, kw_only=True)
    form.__doc__ = inspect.getdoc(kind)
    return form


def _list_form(parts: list[dict[str, Any]], hint: Any) -> Any:
    named, choices = kinds(hint), Place((), hint, parts, 0).choices
    fields: list[Any] = []
    for index, item in enumerate(parts):
        if choices:
            shown = Annotated[Literal[choices], tyro.conf.arg(name=str(index))]  # type: ignore[valid-type]
            fields.append((f"_{index}_KIND", shown, _field(default=item["kind"])))
        fields.append((f"_{index}", Annotated[_form(item, named[item["kind"]]), tyro.conf.arg(name=str(index))]))
    form = dataclasses.make_dataclass("Form", fields, kw_only=True)
    form.__doc__ = None
    return form


def _field(**told: Any) -> Any:
    return dataclasses.field(**told)


def _kind_names(held: Any) -> Any:
    if isinstance(held, list):
        return tuple(map(_kind_names, held))
    return "None" if held is None else held["kind"]


def _fill(part: dict[str, Any], kind: type, form: Any) -> None:
    """Put what was read through a form into the encoded part that it was built after."""
    for name, hint in hints(kind).items():
        held = part.get(name)
        if isinstance(held, dict):
            _fill(held, kinds(hint)[held["kind"]], getattr(form, name))
        elif isinstance(held, list) and several(hint):
            for index, item in enumerate(held):
                _fill(item, kinds(several(hint))[item["kind"]], getattr(getattr(form, name), f"_{index}"))
        elif not kinds(several(hint) or hint):
            part[name] = _as_json(getattr(form, name))


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value
