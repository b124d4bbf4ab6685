"""The exception for invalid input, and parts of its messages."""

import difflib
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence

_MOST_LINES = 40


class InputError(ValueError):
    """Invalid input. The message says what came, what was expected and how to fix it.

    The command line prints it without a traceback and exits with status 2. Any other exception is a bug in cm_jax.
    """


class DamagedError(InputError):
    """A file is damaged or incomplete; an older checkpoint may be readable."""


def shape_complaints(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each tensor that is missing, unexpected or of the wrong shape."""
    return [
        *(f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found),
        *(
            f"wrong shape: {name} is {list(found[name])}, the architecture needs {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
        *(f"not part of the network: {name} {list(shape)}" for name, shape in found.items() if name not in expected),
    ]


def check_int(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int. Raises InputError unless it is an integer from `least` to `most`.

    Integers of NumPy and JAX and their arrays of shape [] are integers, too; bool is not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {one_line(value)}.")
    return number


def one_line(value: object, most: int = 40) -> str:
    """A value in messages: its repr in one line, cut after `most` characters."""
    text = " ".join(_BRIEF.repr(value).split())
    return text if len(text) < most else text[: most - 4] + " ..."


class _Brief(reprlib.Repr):
    """The beginning of a repr. A small pickle may hold lists of the same lists whose whole repr exceeds any memory."""

    repr_OrderedDict = reprlib.Repr.repr_dict  # noqa: N815  reprlib looks for this name


_BRIEF = _Brief()
_BRIEF.maxlevel = 3
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = _BRIEF.maxfrozenset = 20
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 1000


def nearest(word: object, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" if one of the choices is similar, else an empty string."""
    names = list(choices)
    folded = {_folded(name): name for name in names}
    close = difflib.get_close_matches(_folded(word), folded, n=1) if isinstance(word, str) else []
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def indented_list(lines: Sequence[str]) -> str:
    """Indented lines; a long list is cut, with the number of further lines."""
    rest = [f"... and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n  ".join([*lines[:_MOST_LINES], *rest])
