"""Command lines, read by tyro: every field of a dataclass is an option, with its docstring as help.

`--path NAME` for a field that holds a component exchanges the component, before tyro reads the other options.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

import docstring_parser
import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo, StructConstructorSpec, StructFieldSpec

from cm_jax.checkpoints.serialization import HIDDEN, decode, default_of, encode, hints, kinds, may_be_none
from cm_jax.errors import InputError, nearest
from cm_jax.types import ImageSize

T = TypeVar("T")
O = TypeVar("O")  # noqa: E741

_COMPONENTS = """An option that chooses a component sets the defaults of the new component; its own options then replace
those of the former one. Choosing the current component keeps its values. Add --help to see the new options."""
_REGISTRY = tyro.constructors.ConstructorRegistry()
_cli = functools.partial(tyro.cli, return_unknown_args=True, registry=_REGISTRY)


def parse(kind: type[T], prog: str, words: Sequence[str]) -> T:
    """An instance of a dataclass from the command line.

    Raises InputError; prints a message and exits with status 2 for values that cannot be read; prints help and exits.
    """
    return dataclasses.replace(_read(_unchecked(kind), prog, words, inspect.getdoc(kind) or ""))


def parse_preset(
    presets: Mapping[str, T | Callable[[], T]], options: O, prog: str, words: Sequence[str]
) -> tuple[str, T, O]:
    """(name, configuration, options): a preset and `options` with the values that the words set.

    A preset is an instance of a frozen dataclass or a function that returns one; its docstring is its help.
    """
    name, preset, words = choose(presets, "preset", f"{prog} PRESET [--field value ...]", words)
    config: Any = preset() if callable(preset) else preset
    config, words = _exchange(config, words)
    description = f"{inspect.getdoc(preset)}\n\n{_COMPONENTS}"
    nested = [(each, Annotated[type(value), tyro.conf.arg(name="")]) for each, value in [("o", options), ("c", config)]]
    both = _unchecked(dataclasses.make_dataclass("Both", nested), o=options, c=config)
    found = _read(both, f"{prog} {name}", words, description, [options, config])
    return name, decode(encode(found.c), type(config)), dataclasses.replace(found.o)


def choose(
    choices: Mapping[str, T], what: str, usage: str, words: Sequence[str], examples: Sequence[str] = ()
) -> tuple[str, T, Sequence[str]]:
    """(name, choice, remaining words) of the choice that the first word names. Lists the choices for --help."""
    if words and words[0] in ("-h", "--help"):
        _list_choices(choices, what, usage, examples)
    advice = f" --help lists the {what}s." if len(choices) > 12 else f" Choose one of {', '.join(choices)}."
    if not words or words[0].startswith("-"):
        raise InputError(f"Name a {what} first: {usage}.{advice}")
    if words[0] not in choices:
        raise InputError(f"There is no {what} {words[0]!r}.{nearest(words[0], choices) or advice}")
    return words[0], choices[words[0]], words[1:]


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """The numbers of a comma-separated list; None for an empty text."""
    if not text:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} must be {wanted} separated by commas, got {text!r}.") from error


class _Option(NamedTuple):
    """A field of a configuration or of a component in it."""

    path: tuple[str, ...]
    hint: Any
    value: Any

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")

    @property
    def choices(self) -> list[str]:
        """Names of the components that the field accepts; empty for plain values and where there is only one."""
        names = [*kinds(self.hint), *(["none"] if may_be_none(self.hint) and kinds(self.hint) else [])]
        return names if len(names) > 1 else []

    @property
    def chosen(self) -> str:
        return "none" if self.value is None else type(self.value).__name__


def _options(config: Any, above: tuple[str, ...] = ()) -> Iterator[_Option]:
    for name, hint in _shown(type(config)).items():
        value = getattr(config, name)
        yield _Option((*above, name), hint, value)
        if dataclasses.is_dataclass(value):
            yield from _options(value, (*above, name))


def _shown(kind: type) -> dict[str, Any]:
    """The types of the fields that command lines have."""
    hidden = {field.name for field in dataclasses.fields(kind) if field.metadata == HIDDEN}
    return {name: hint for name, hint in hints(kind).items() if name not in hidden}


def _exchange(config: Any, words: Sequence[str]) -> tuple[Any, list[str]]:
    """The configuration with the components that the words name; the words with the components' exact names."""
    pairs = [word.partition("=")[::2] if word.startswith("--") and "=" in word else (word,) for word in words]
    result = [word for pair in pairs for word in pair]
    flags = [index for index, word in enumerate(result[:-1]) if word.startswith("--")]
    for index in sorted(flags, key=lambda index: result[index].count(".")):
        named = (option for option in _options(config) if option.flag == result[index].replace("_", "-"))
        option = next(named, None)
        if option is not None and option.choices:
            result[index + 1] = name = _full_name(result[index + 1], option)
            if name != option.chosen:
                component = None if name == "none" else _unchecked(kinds(option.hint)[name])
                config = _replaced(config, option.path, component)
    return config, result


def _full_name(word: str, option: _Option) -> str:
    """The component that a word names, in any case, with or without hyphens; an unambiguous beginning suffices."""
    folded = {name.lower(): name for name in option.choices}
    short = word.lower().replace("-", "").replace("_", "")
    found = [folded[short]] if short in folded else [name for key, name in folded.items() if key.startswith(short)]
    if len(found) != 1:
        hint = nearest(word, option.choices)
        raise InputError(f"{option.flag} must be one of {', '.join(option.choices)}, got {word!r}.{hint}")
    return found[0]


def _replaced(config: Any, path: Sequence[str], component: Any) -> Any:
    if not path:
        return component
    return _unchecked(type(config), config, **{path[0]: _replaced(getattr(config, path[0]), path[1:], component)})


def _unchecked(kind: type, base: Any = None, **values: Any) -> Any:
    """An instance without the checks of its constructor: its values are complete only after the whole command line."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value = values.get(field.name, getattr(base, field.name, default_of(field)))
        object.__setattr__(made, field.name, tyro.MISSING if value is dataclasses.MISSING else value)
    return made


def _read(default: T, prog: str, words: Sequence[str], description: str, parts: Sequence[Any] = ()) -> T:
    """The default with the values of the words, unchecked."""
    found, unknown = _cli(type(default), default=default, prog=prog, args=words, description=description)
    if unknown:
        raise _refusal(unknown[0], [option for part in parts or [default] for option in _options(part)])
    return found


def _refusal(word: str, options: Sequence[_Option]) -> InputError:
    """For a word that belongs to no option: names the component that has the option, or the nearest options."""
    if not word.startswith("--"):
        return InputError(f"Unexpected argument {word!r}. --help lists the arguments.")
    flag = word.partition("=")[0].replace("_", "-")
    head, _, last = flag.rpartition(".")
    for option in options:
        having = [name for name, kind in kinds(option.hint).items() if last.replace("-", "_") in hints(kind)]
        if option.flag == head and having:
            needed = f"{head} is {option.chosen} here. It needs {head} {' or '.join(having)}."
            return InputError(f"There is no option {flag}: {needed}")

    def likeness(known: str) -> float:
        """Of the flag to a known one or to the end of it."""
        parts = known[2:].split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        given = {flag[2:], flag[2:].replace("no-", "", 1)}
        return max(difflib.SequenceMatcher(None, each, end).ratio() for end in ends for each in given)

    scores = {option.flag: likeness(option.flag) for option in options if option.choices or not kinds(option.hint)}
    best = max(scores.values(), default=0)
    close = [known for known, score in scores.items() if score == best >= 0.6][:3]
    advice = f"Did you mean {' or '.join(close)}?" if close else "--help lists the options."
    return InputError(f"There is no option {flag}. {advice}")


@_REGISTRY.struct_rule
def _struct(info: Any) -> StructConstructorSpec | None:
    """Dataclasses: a choice for each component, then the fields of the current one. Inherited fields come last."""
    kind: type = info.type
    if not dataclasses.is_dataclass(kind):
        return None
    fields, texts, annotated = [], _descriptions(kind), typing.get_type_hints(kind, include_extras=True)
    order = (name for base in kind.__mro__ for name in inspect.get_annotations(base) if name in _shown(kind))
    for name in dict.fromkeys(order):
        hint, text = annotated[name], texts.get(name)
        option = _Option((name,), hints(kind)[name], getattr(info.default, name))
        if option.choices:
            choice = Annotated[Literal[tuple(option.choices)], tyro.conf.arg(name=name)]  # type: ignore[valid-type]
            fields.append(StructFieldSpec(f"{name}_CHOICE", choice, option.chosen, text))  # type: ignore[arg-type]
        if dataclasses.is_dataclass(option.value):
            held = type(option.value) if option.choices else hint
            summary = (inspect.getdoc(type(option.value)) or "").partition("\n\n")[0]
            fields.append(StructFieldSpec(name, held, option.value, summary))  # type: ignore[arg-type]
        elif not kinds(option.hint):
            stated = "Default:" in (text or "") and isinstance(option.value, bool | None)
            shown = tyro.conf.arg(help_behavior_hint="" if stated or option.value in ("", ()) else None)
            fields.append(StructFieldSpec(name, Annotated[hint, shown], option.value, text))  # type: ignore[arg-type]
    return StructConstructorSpec(functools.partial(_unchecked, kind, info.default), tuple(fields))


@_REGISTRY.primitive_rule
def _primitive(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Numbers, paths, choices and values that may be none, with plain messages."""
    optional = may_be_none(info.type)
    kind = next(each for each in typing.get_args(info.type) if each is not type(None)) if optional else info.type
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if not choices and kind not in (int, float, Path) and not (optional and kind is str):
        return None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper(),
        instance_from_str=lambda words: _value(words[0], kind, choices, optional),
        is_instance=lambda value: value is None or value in choices or isinstance(value, kind),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def _value(word: str, kind: Callable[[str], Any], choices: tuple[str, ...], optional: bool) -> Any:
    """The value of a word. Raises ValueError."""
    if optional and word.lower() == "none":
        return None
    shown = repr(word) if len(word) < 60 else f"{word[:56]!r} ..."
    if choices and word not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}, got {shown}.{nearest(word, choices)}")
    try:
        return word if choices else kind(os.path.expanduser(word) if kind is Path else word)  # shells keep --output=~/a
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"expected {wanted}{' or none' if optional else ''}, got {shown}.") from error


@_REGISTRY.primitive_rule
def _image_size(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Image sizes: 64, or height and width as 16,32. A field that may be none reads one word, the others also 16 32."""
    if info.type not in (ImageSize, ImageSize | None):
        return None
    one_word = info.type != ImageSize

    def read(words: list[str]) -> ImageSize:
        parts = [part for word in words for part in word.split(",")]
        if not 1 <= len(parts) <= 2 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"expected a size such as 64, or height and width such as 16,32, got {' '.join(words)!r}.")
        sides = tuple(map(int, parts))
        return sides if len(sides) == 2 else sides[0]

    return PrimitiveConstructorSpec(
        nargs=1 if one_word else (1, 2),
        metavar="SIZE",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int | tuple),
        str_from_instance=lambda value: [",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()],
    )


@functools.cache
def _descriptions(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields."""
    bases = reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)])
    found = [text for base in bases for text in docstring_parser.parse_from_object(base).params]
    return {text.arg_name: " ".join((text.description or "").split()) for text in found}


def _list_choices(choices: Mapping[str, Any], what: str, usage: str, examples: Sequence[str]) -> NoReturn:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, choice in choices.items():
        help_text = choice if isinstance(choice, str) else inspect.getdoc(choice) or ""
        table.add_row(name, " ".join(help_text.partition("\n\n")[0].split()))
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as text:  # printed at once: rich has its own way to end at a closed pipe
        console.print(f"usage: {usage}\n")
        console.print(Panel(table, title=f"{what}s", title_align="left"))
        console.print(f"Add --help after a {what} to list its options.")
        if examples:
            console.print("\n  ".join(("\nExamples:", *examples)), soft_wrap=True)
    print(text.get(), end="")
    raise SystemExit(0)
