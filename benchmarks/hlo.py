"""Instructions of a compiled program and their work, and its communication between devices, from its text."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_KINDS = frozenset(
    ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
)


class Collective(NamedTuple):
    """A collective operation: its kind, the bytes of its result, and the devices that communicate."""

    kind: str
    size: int
    groups: frozenset[frozenset[int]]
    """Positions of the devices in the mesh; empty for kinds without groups."""


def collectives(program: str) -> list[tuple[str, int]]:
    """(kind, bytes) of each collective operation in the text of a compiled program."""
    return [(each.kind, each.size) for each in collectives_with_groups(program)]


def collectives_with_groups(program: str) -> list[Collective]:
    """Each collective operation in the text of a compiled program.

    TPUs split the work of one over several fusions, which share its channel, and write reduce-scatter as a fusion.
    """
    parsed = Program(program)
    bodies = parsed.computations
    fused = {_called(each.rest) for body in bodies.values() for each in body if each.opcode == "fusion"}
    found: dict[object, Collective] = {}
    for name, body in bodies.items():
        for each in body:
            kind = each.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", each.rest)
            identity = (kind, channel[1]) if channel and name in fused else each.name
            scattered = name in fused and name.startswith("all-reduce-scatter")
            shape = body[-1].shape if scattered else each.shape
            arrays = [match[0] for match in _ARRAY.finditer(shape)]
            if each.opcode != kind and kind != "all-reduce" and len(arrays) > len(each.operands):
                arrays = arrays[len(each.operands) : 2 * len(each.operands)]  # the first half are the operands
            size = sum(_bytes(array.partition("{")[0]) for array in arrays)
            groups = frozenset(frozenset(map(int, row)) for row in _groups(each.rest))
            found.setdefault(identity, Collective("reduce-scatter" if scattered else kind, size, groups))
    return list(found.values())


def _groups(operation: str) -> np.ndarray | list[list[int]]:
    """The rows of replica_groups, in any of the three ways in which XLA writes them."""
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", operation):  # {{0,1},{2,3}}
        return [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", operation):  # [4,2]<=[2,4]T(1,0)
        return _devices(match[2], _numbers(match[1]))
    match = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\S+)\))? \{(.*?)\}", operation)
    if match is None:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}  # mesh['a'=4,'b'=2] {'a'}
    mesh = _devices(match[2] or f"[{np.prod(list(sizes.values()))}]", list(sizes.values()))
    over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[3])]
    return np.moveaxis(mesh, over, range(-len(over), 0)).reshape(-1, np.prod([mesh.shape[axis] for axis in over]))


def _devices(order: str, shape: list[int]) -> np.ndarray:
    """0, 1, 2, ... in an order such as [2,4]T(1,0)."""
    dims, _, axes = order.partition("T")
    devices = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(axes) if axes else None).reshape(shape)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


class Work(NamedTuple):
    """Work of one instruction: bytes read and written (each array once) and operations of its products.

    None if unknown.
    """

    label: str
    bytes: float | None = None
    operations: float | None = None


_LINE = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_SCRATCH = re.compile(r"\b[us]8\[\d*\](\{[^}]*\})?")
"""Scratch space among the results of a library kernel."""
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"))
"""Instructions that take no time."""
_BOTH = frozenset(("copy-start", "all-gather-start", "reduce-scatter-start", "collective-permute-start"))
"""Instructions whose results contain their operands."""


class Traffic(NamedTuple):
    """All instructions of one kind: how many run, bytes read and written, operations of products."""

    kind: str
    number: int
    bytes: float
    operations: float


class Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    """The line after the opening parenthesis of the operands."""


class Program:
    """A compiled program, parsed from the text of `jax.stages.Compiled.as_text`."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._by_name: dict[str, Instruction] = {}
        current = self.computations.setdefault("", [])
        for line in text.splitlines():
            if begun := _COMPUTATION.match(line):
                current = self.computations.setdefault(begun["name"], [])
                self.entry = begun["name"] if begun["entry"] else self.entry
            elif found := _LINE.match(line):
                operands = tuple(re.findall(r"%([\w.\-]+)", found["rest"][: _closing(found["rest"])]))
                each = Instruction(found["name"], found["opcode"], found["shape"], operands, found["rest"])
                current.append(each)
                self._by_name[each.name] = each

    def counts(self) -> dict[str, int]:
        """Number of instructions by opcode, including those in fusions; library kernels by their names."""
        instructions = [each for body in self.computations.values() for each in body if each.opcode not in _FREE]
        return dict(collections.Counter(_target(each) or each.opcode for each in instructions).most_common())

    def converted(self) -> dict[str, int]:
        """Bytes written by dtype conversions, by "from -> to". Conversions in fusions cause no memory traffic."""
        found: dict[str, int] = collections.Counter()
        for each in (each for body in self.computations.values() for each in body if each.opcode == "convert"):
            source = self._by_name.get(each.operands[0]) if each.operands else None
            kinds = [_ARRAY.search(shape) for shape in (source.shape if source else "", each.shape)]
            found[" -> ".join(kind[1] if kind else "?" for kind in kinds)] += _bytes(each.shape)
        return dict(found)

    def work(self, name: str) -> Work | None:
        """Work of the instruction with this name; None if it does not exist."""
        each = self._by_name.get(name)
        if each is None:
            return None
        size = _bytes(_SCRATCH.sub("", each.shape) if _target(each) else each.shape)
        if each.opcode not in _BOTH:
            size += sum(self._read(each, o) for o in dict.fromkeys(each.operands) if o in self._by_name)
        operations = self._operations(each)
        kind = _target(each) or each.opcode
        if kind == "fusion":
            kind = "fusion with a product" if operations else "fusion, " + (_called_by(each) or "")
        found = _ARRAY.search(each.shape)
        return Work(f"{kind} -> {found[0].partition('{')[0] if found else each.shape[:40]}", size, operations)

    def _read(self, each: Instruction, operand: str) -> int:
        """Bytes of an operand that an instruction reads: a fusion may use slices of it alone."""
        whole = _bytes(self._by_name[operand].shape)
        inside = self.computations.get(_called(each.rest), []) if each.opcode == "fusion" else []
        number = f"{each.operands.index(operand)})"
        names = {inner.name for inner in inside if inner.opcode == "parameter" and inner.rest.startswith(number)}
        slices = 0
        for inner in inside:
            if inner.opcode == "bitcast" and names.issuperset(inner.operands):
                names.add(inner.name)
            elif inner.opcode in ("slice", "dynamic-slice", "gather") and inner.operands[0] in names:
                slices += _bytes(inner.shape)
            elif names.intersection(inner.operands):
                return whole
        return min(whole, slices) if slices else whole

    def traffic(self) -> list["Traffic"]:
        """What one run of the program reads and writes, by kind of instruction, largest first."""
        found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
        for each, times in self._executed(self.entry):
            work = self.work(each.name)
            assert work is not None
            for index, value in enumerate((1, work.bytes or 0, work.operations or 0)):
                found[work.label.partition(" -> ")[0]][index] += times * value
        return sorted((Traffic(kind, int(row[0]), *row[1:]) for kind, row in found.items()), key=lambda row: -row.bytes)

    def _executed(self, computation: str) -> Iterator[tuple[Instruction, int]]:
        """Instructions that take time, with those of loops, calls and branches, and how often each runs."""
        for each in self.computations[computation]:
            if each.opcode in ("while", "call", "conditional", "async-start"):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.rest)
                for name in re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", each.rest):
                    for inner, times in self._executed(name):
                        yield inner, times * int(trips[1] if trips else 1)
            elif each.opcode not in _FREE and not each.opcode.endswith(("-done", "-update")):
                yield each, 1

    def _operations(self, each: Instruction) -> float | None:
        """Operations of its products; 0 without products, None if unknown."""
        shapes = [_dimensions(self._by_name[o].shape) for o in each.operands if o in self._by_name]
        result = _dimensions(each.shape)
        target = _target(each)
        if each.opcode == "fusion":
            inside = self.computations.get(_called(each.rest), [])
            return math.fsum(self._operations(inner) or 0 for inner in inside)
        if each.opcode == "convolution" or "onv" in target:
            if len(shapes) < 2 or not (labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)):
                return None
            # Output and kernel of the forward convolution, also for its gradients
            output, kernel = (
                (shapes[0], shapes[1]) if "BackwardInput" in target
                else (shapes[1], result) if "BackwardFilter" in target
                else (result, shapes[1])
            )  # fmt: skip
            return 2.0 * math.prod(output) * math.prod(kernel) / output[labels[3].index("f")]
        if "fmha" in target and len(shapes) > 1:  # queries [b, t, n, h], keys [b, s, n, h]: 2 products, backward 5
            return (10.0 if "Backward" in target else 4.0) * math.prod(shapes[0]) * shapes[1][1]
        if each.opcode == "dot" or "gemm" in target or "matmul" in target:
            contracted = re.search(r'lhs_contracting_dim\w*"?[=:][{\[]([\d,"]*)[}\]]', each.rest)
            if not shapes or not contracted:
                return None
            depth = math.prod(shapes[0][int(axis)] for axis in re.findall(r"\d+", contracted[1]))
            return 2.0 * math.prod(result) * depth
        return None if target else 0.0


def _closing(rest: str) -> int:
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(rest)


def _target(each: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', each.rest)
    if found is None and each.opcode == "fusion":
        found = re.search(r'"kind":"(__[^"]*)"', each.rest)  # a Triton or cuDNN kernel for a fusion
    return found[1] if found else ""


def _called(rest: str) -> str:
    found = re.search(r"calls=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def _called_by(each: Instruction) -> str:
    """The kind of a fusion, from its name: "loop_convert_fusion" for "loop_convert_fusion.12"."""
    return re.sub(r"[.\d]+$", "", each.name)


def _dimensions(shape: str) -> tuple[int, ...]:
    """Dimensions of the first array."""
    found = _ARRAY.search(shape)
    return tuple(int(size) for size in found[3].split(",") if size) if found else ()


def _bytes(shape: str) -> int:
    """Bytes in the main memory of a device: with the padding of tiled layouts, without arrays in other memories."""
    return sum(
        math.prod(_padded(sizes, layout)) * max(8, int(bits or 8)) // 8
        for _, bits, sizes, layout in _ARRAY.findall(shape)
        if "S(" not in layout
    )


def _padded(sizes: str, layout: str) -> list[int]:
    """Sizes rounded up to the tile of a TPU layout such as {3,0,2,1:T(8,128)}, whose first axis is the fastest."""
    padded, tile = _numbers(sizes), re.search(r"T\(([\d,]+)\)", layout)
    axes = _numbers(layout.partition(":")[0])
    for axis, unit in zip(axes, reversed(_numbers(tile[1] if tile else "")), strict=False):
        padded[axis] = -(-padded[axis] // unit) * unit
    return padded
