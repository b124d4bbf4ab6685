"""The words of a command line: read by tyro, refused in our own words, one line each."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from cm_jax.errors import InputError, nearest

T = TypeVar("T")


def parsed(
    kind: type[T], prog: str, arguments: Sequence[str] | None, *, flags: Sequence[str] = (), description: str = ""
) -> T:
    """An instance of a dataclass from the command line. Raises InputError; prints and exits where help is wanted.

    flags: those that a mistyped one may have meant; by default the names of the fields.
    """
    names = flags or [_flag(field.name) for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    with _our_words(names):
        return tyro.cli(kind, prog=prog, args=arguments, description=description or None)


def chosen(
    choices: Mapping[str, T], what: str, usage: str, arguments: Sequence[str], examples: Sequence[str] = ()
) -> tuple[str, T, Sequence[str]]:
    """The choice that the first argument names, with its name and the arguments after it.

    Prints the list of choices, with the first paragraph of each one's docstring, and exits where help is wanted. Raises
    InputError for a name that is not there.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        show_choices(choices, what, usage, examples)
    advice = f" --help lists the {what}s." if len(choices) > 12 else f" Choose one of {', '.join(choices)}."
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"Name a {what} first: {usage}.{advice}")
    if arguments[0] not in choices:
        raise InputError(f"There is no {what} {arguments[0]!r}.{nearest(arguments[0], choices) or advice}")
    return arguments[0], choices[arguments[0]], arguments[1:]


def show_choices(choices: Mapping[str, Any], what: str, usage: str, examples: Sequence[str] = ()) -> NoReturn:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, choice in choices.items():
        table.add_row(Text(name), Text(" ".join((choice.__doc__ or "").strip().partition("\n\n")[0].split())))
    console = Console(highlight=False)
    console.print(Text(f"usage: {usage}\n"))
    console.print(Panel(table, title=f"{what}s", title_align="left"))
    console.print(Text(f"After a {what}, --help shows its options."))
    if examples:
        console.print(Text("\n  ".join(("\nFor example:", *examples))), soft_wrap=True)
    raise SystemExit(0)


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """The numbers of a comma-separated list; None for an empty text."""
    if not text:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} wants {wanted} with commas between, got {text!r}.") from error


def unknown_option(flag: str, flags: Sequence[str]) -> InputError:
    """For an option that does not exist: names those that are nearest, by their whole name or any end of it."""

    def likeness(known: str) -> float:
        parts = known[2:].split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        return max(difflib.SequenceMatcher(None, word, end).ratio() for end in ends for word in words)

    flag = flag.partition("=")[0].replace("_", "-")
    words = {flag.lstrip("-"), flag.lstrip("-").replace("no-", "", 1)}
    scores = {known: likeness(known) for known in flags}
    best = max(scores.values(), default=0)
    close = [known for known, score in scores.items() if score == best >= 0.6][:3]
    hint = f"Did you mean {' or '.join(close)}?" if close else "--help lists the options."
    return InputError(f"There is no option {flag}. {hint}")


@contextlib.contextmanager
def _our_words(flags: Sequence[str]) -> Iterator[None]:
    """Raise InputError where tyro would print a box and exit. A version of tyro without the hook prints its box."""
    try:
        from tyro import _errors
    except ImportError:
        yield
        return

    def refuse(event: _errors.ParseErrorEvent) -> None:
        match event:
            case _errors.UnrecognizedArgs(tokens=words) | _errors.MissingArgs(unrecognized_tokens=[*words]) if words:
                unknown = [word for word in words if word.startswith("--")]
                if unknown:
                    raise unknown_option(unknown[0], flags)
                raise InputError(f"{words[0]!r} is more than is wanted there. --help tells what is.")
            case _errors.MissingArgs(missing_arguments=missing):
                names = " and ".join(_name(argument.arg) for argument in missing)
                raise InputError(f"{names} must be given: {'it has' if len(missing) == 1 else 'they have'} no default.")
            case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
                wanted = ", ".join(choice for choice in choices if choice)
                raise InputError(f"{_name(argument)} must be one of {wanted}, got {value!r}.{nearest(value, choices)}")
            case _errors.BadValue(argument=argument) if argument.is_positional():
                raise InputError(f"{_name(argument)} must be given: it has no default.")
            case _errors.BadValue(argument=argument):
                raise InputError(f"{_name(argument)} needs {_wanted(argument) or 'a value'}.")
            case _errors.InstantiationFailure(argument=argument, message=message):
                words = re.findall(r"'([^']*)'", (re.search(r"\[.*?\]", message) or [message])[0])
                if argument is None or not _wanted(argument) or not words:
                    raise InputError(message)
                raise InputError(f"{_name(argument)} must be {_wanted(argument)}, got {' '.join(words)!r}.")

    with _errors.on_parse_error(refuse):
        yield


def _name(argument: Any) -> str:
    """Of an argument, as tyro describes it."""
    return str(argument.lowered.metavar) if argument.is_positional() else argument.lowered.name_or_flags[0]


def _wanted(argument: Any) -> str:
    """What an argument takes, in words; empty for what is no number."""
    metavar = str(argument.lowered.metavar)
    kind = "whole number" if "INT" in metavar else "number"
    count = metavar.count("INT") + metavar.count("FLOAT")
    if count > 1:
        return f"{kind}s" if "[" in metavar else f"{count} {kind}s"
    return f"a {kind}{' or None' if '{None}' in metavar else ''}" if count else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
