"""A restricted unpickler: reads data from pickles without running code.

It accepts only the opcodes and globals that a format consists of and refuses all others, so that a malicious file
raises InputError and nothing else. (torch.load with weights_only is as strict, but sampling would require PyTorch.)
Training code also pickles objects of its own next to the tensors; `is_plain_class` says which are read as inert data.
"""

import _compat_pickle
import io
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cm_jax.errors import InputError, one_line
from cm_jax.io.atomic import read_errors
from cm_jax.io.safetensors import LazyTensor
from cm_jax.types import leaves

_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.REDUCE, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINPERSID, pickle.BINFLOAT, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2),
    *(pickle.TUPLE3, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT),
    *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.SHORT_BINSTRING, pickle.BINSTRING),
    *(pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
)
"""Opcodes of pickled dictionaries of tensors, arrays and numbers, in protocols 2 to 5, from Python 2 on."""

_PYTHON_TYPES = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"
_PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
_NUMBERS = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_ARRAYS = "_reconstruct scalar"
_CLASSES = {
    "argparse": "Namespace",
    "builtins": _PYTHON_TYPES,
    "__builtin__": _PYTHON_TYPES,
    "collections": "Counter defaultdict deque",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "types": "SimpleNamespace",
    "typing": "Any Dict List Optional Tuple Union",
    "uuid": "UUID",
    "numpy": f"bool bool_ dtype ndarray {_NUMBERS}",
    "numpy.core.multiarray": _ARRAYS,
    "numpy._core.multiarray": _ARRAYS,
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "torch": f"Size bfloat16 bool complex64 complex128 device {_NUMBERS}",
    "torch.storage": "",
}
"""For modules whose names do not follow the rule of `is_plain_class`: the globals that are inert, and no others."""


class Budget:
    """Counts the modules and tensors read from a file: objects that hold each other twice have endless many names."""

    def __init__(self) -> None:
        self._left = 100_000  # a state of training with several EMAs has 20,000

    def spend(self, number: int = 1) -> None:
        """Raises ValueError when all is spent."""
        self._left -= number
        if self._left < 0:
            raise ValueError("it holds more than 100,000 modules and tensors")


def checked_key(key: Any) -> Any:
    """A key of a dictionary. Raises ValueError for nested tuples, because hashing those may take forever."""
    if isinstance(key, tuple | frozenset) and any(isinstance(part, tuple | frozenset) for part in key):
        raise ValueError("a key that is a nested tuple")
    return key


class Inert:
    """An object of a pickle without its class: the arguments of its constructor, its pickled state, and its content."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        """Entries, for an object of a subclass of dict."""
        self.elements: list[Any] = []
        """Elements, for an object of a subclass of list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def extend(self, elements: list[Any]) -> None:
        self.elements.extend(elements)


def is_plain_class(module: str, name: str) -> bool:
    """Whether a global of a pickle is read as inert data: an object that keeps its content and does nothing.

    No global is ever imported or called, so this decides only which files are refused. Inert are the classes that
    training code pickles next to tensors: those of third-party modules, recognized by their spelling (`Config`,
    `Trainer.State`), and the listed ones of Python, NumPy and PyTorch (argparse.Namespace, paths, dtypes). Everything
    else is refused, because a harmless file has no reason to name it: functions (os.system, builtins.eval), all other
    names of the standard library (subprocess.Popen), methods of classes (Path.touch).
    """
    if module in _CLASSES:
        return name in _CLASSES[module].split()
    standard = (
        module.partition(".")[0] in sys.stdlib_module_names or module in _compat_pickle.IMPORT_MAPPING
    )  # Python 2
    return not standard and re.fullmatch(r"_?[A-Z]\w*(\._?[A-Z]\w*)*", name) is not None


class RestrictedUnpickler(pickle._Unpickler):
    """Refuses every opcode and global except those listed: `allowed` has a harmless substitute for each global.

    It extends the unpickler written in Python, because the one in C trusts the sizes in a damaged file.
    """

    dispatch: ClassVar[dict[int, Any]] = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES}
    dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]]  # the substitute is called, and __new__ of no class

    def __init__(
        self, path: Path, file: io.BufferedIOBase, allowed: Mapping[tuple[str, str], Any] | None = None
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._path, self._allowed = path, allowed or {}

    def load_newobj_ex(self) -> None:
        """As NEWOBJ; the keyword arguments are dropped."""
        stack = self.stack  # type: ignore[attr-defined]
        _, arguments = stack.pop(), stack.pop()
        stack[-1] = stack[-1](*arguments)

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        """Keep the state of an inert object; drop the attributes of a state dict."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        if isinstance(self.stack[-1], Inert):  # type: ignore[attr-defined]
            self.stack[-1].state = state  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        checked_key(self.stack[-2])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            checked_key(key)
        super().load_setitems()  # type: ignore[misc]

    def load_additems(self) -> None:
        for key in self.stack:  # type: ignore[attr-defined]
            checked_key(key)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        for key in self.stack:  # type: ignore[attr-defined]
            checked_key(key)
        super().load_frozenset()  # type: ignore[misc]

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        raise InputError(
            f"Expected a state dict of tensors, got a file that runs {module}.{name} when it is read: {self._path}. It "
            "was refused and nothing was run; if you trust it, load it with its own program and save the tensors alone."
        )


def read_arrays(path: Path) -> dict[str, LazyTensor]:
    """NumPy arrays of a pickled tree of dictionaries, by path ("Conv_0/kernel").

    Raises InputError for a damaged file, and for a file with anything but floating-point arrays.
    """
    reconstruct = [(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")]
    allowed = {("numpy", "ndarray"): None, **dict.fromkeys([("numpy", "dtype"), *reconstruct], Inert)}
    with read_errors(path, "pickle of NumPy arrays"):
        tree = RestrictedUnpickler(path, io.BytesIO(path.read_bytes()), allowed).load()
        _check_tree(tree, set())
        return {name: pickled_array(leaf) for name, leaf in leaves(tree)}


def _check_tree(tree: Any, seen: set[int]) -> None:
    """Raise ValueError for a dictionary in several places, which may have endless many leaves."""
    if isinstance(tree, dict):
        if id(tree) in seen:
            raise ValueError("a dictionary in several places")
        seen.add(id(tree))
        for branch in tree.values():
            _check_tree(branch, seen)


def pickled_array(pickled: Inert) -> LazyTensor:
    """A pickled NumPy array. Raises ValueError for one that does not hold floating-point numbers."""
    _, shape, dtype, column_major, content = pickled.state
    array = np.frombuffer(content, number_type(dtype)).reshape(shape, order="F" if column_major else "C")
    return LazyTensor(array.shape, array.dtype, lambda: array)


def number_type(dtype: Inert) -> np.dtype:
    """A pickled NumPy dtype. Raises ValueError for all but little-endian floating-point numbers."""
    name, order = dtype.arguments[0], dtype.state[1]
    if name not in ("f2", "f4", "f8") or order != "<" or dtype.state[2:5] != (None, None, None):
        raise ValueError(f"an array of type {one_line((order, name))}")
    return np.dtype(f"<{name}")
