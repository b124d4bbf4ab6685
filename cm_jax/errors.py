"""The one exception that bad input raises, and the wording of complaints."""

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence

_MOST_LINES = 40


class InputError(ValueError):
    """Something given to us cannot be used. The message says what came, what was wanted and what to do.

    The command line prints it without a traceback and exits with status 2. Any other exception is our bug.
    """


def shape_complaints(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for every tensor that is missing, superfluous or of the wrong shape."""
    return [
        *(f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found),
        *(
            f"wrong shape: {name} is {list(found[name])}, the architecture needs {list(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
        *(f"not part of the network: {name} {list(shape)}" for name, shape in found.items() if name not in wanted),
    ]


def check_int(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int. Raises InputError unless it is a whole number from `least` to `most`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= most:  # type: ignore[arg-type]
        shown = repr(value)
        shown = shown if len(shown) < 40 else shown[:36] + " ..."
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {shown}.")
    return int(value)  # type: ignore[arg-type]


def nearest(word: object, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where one of the choices is near, else nothing."""
    names = list(choices)
    folded = {_folded(name): name for name in names}
    close = difflib.get_close_matches(_folded(word), folded, n=1) if isinstance(word, str) else []
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def indented_list(lines: Sequence[str]) -> str:
    """Indented lines; of a very long list the beginning and the number of the rest."""
    rest = [f"... and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n  ".join([*lines[:_MOST_LINES], *rest])
