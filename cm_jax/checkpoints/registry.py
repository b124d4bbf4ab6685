"""Registration of components of other packages, so that files and command lines can name them."""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from cm_jax.errors import InputError, one_line
from cm_jax.networks import AnyNetwork
from cm_jax.types import Network

T = TypeVar("T", bound=type)

_registered: dict[str, type] = {}
_RESERVED = ("kind", "module")
"""Keys of the JSON object of a component, besides its fields."""


def register(component: T) -> T:
    """Let checkpoints, run folders and command lines name a component of your own. Also a class decorator.

    component: a frozen dataclass with the interface of cm_jax.types.Network, or derived from an abstract class of
    cm_jax: Objective, Sampler, Preconditioning, Data, Distance, Weighting and others. Files store its name, its fields
    and, as text, its module, which must be imported before they are loaded: files never import code. A class that is
    defined again, as in a notebook, replaces the former one.

    Raises InputError for anything else, and for the name of a built-in component or of another module's.
    """
    name = getattr(component, "__name__", one_line(component))
    frozen = getattr(getattr(component, "__dataclass_params__", None), "frozen", False)
    if not isinstance(component, type) or not frozen:
        raise InputError(f"Expected a class decorated with @dataclasses.dataclass(frozen=True), got {name}.")
    if missing := ", ".join(sorted(getattr(component, "__abstractmethods__", ()))):
        raise InputError(f"{name} cannot be registered before it has {missing}.")
    if reserved := [field.name for field in dataclasses.fields(component) if field.name in _RESERVED]:
        raise InputError(f"{name} has a field {reserved[0]!r}, a name that files use themselves: rename it.")
    bases = _bases(component)
    if not bases:
        raise InputError(
            f"{name} is no component: expected a subclass of an abstract class such as Objective, Sampler, "
            f"Preconditioning or Data, or a network; it lacks {', '.join(_missing(component))} of a network."
        )
    former = _registered.get(name, component)
    if any(name == other.__name__ for base in bases for other in _built_in(base)):
        raise InputError(f"{name} is the name of a component of cm_jax: give your class another name.")
    if (former.__module__, former.__qualname__) != (component.__module__, component.__qualname__):
        raise InputError(f"{name} is registered by {former.__module__} already: give your class another name.")
    _registered[name] = component
    return component


def registered(base: type) -> dict[str, type]:
    """Registered classes by name that implement an abstract class or the protocol Network."""
    return {name: kind for name, kind in _registered.items() if base in _bases(kind)}


def origin(kind: type) -> str | None:
    """The module that registers a class, for messages; None for components of cm_jax."""
    if _registered.get(kind.__name__) is not kind:
        return None
    if kind.__module__ != "__main__":
        return kind.__module__
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec else Path(getattr(main, "__file__", None) or "__main__").stem


def is_abstract(kind: Any) -> bool:
    """Whether it stands for registered classes in an annotation."""
    return isinstance(kind, type) and (kind is Network or inspect.isabstract(kind))


def _bases(component: type) -> list[type]:
    above = [base for base in component.__mro__[1:] if base.__module__.startswith("cm_jax.") and is_abstract(base)]
    return above if _missing(component) else [*above, Network]


def _missing(component: type) -> list[str]:
    """Members of a network that a class lacks."""
    fields = {field.name for field in dataclasses.fields(component)}
    return [name for name in vars(Network) if name[0] != "_" and not hasattr(component, name) and name not in fields]


def _built_in(base: type) -> Iterator[type]:
    """Classes of cm_jax below a base class."""
    below = [each for each in get_args(AnyNetwork) if each is not Network] if base is Network else base.__subclasses__()
    for each in below:
        if each.__module__.startswith("cm_jax."):
            yield each
            yield from _built_in(each)
