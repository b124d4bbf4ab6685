"""A compiled program, parsed from its text: instructions, and the bytes and operations of each."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


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
ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_SCRATCH = re.compile(r"\b[us]8\[\d*\](\{[^}]*\})?")
"""Scratch space among the results of a library kernel."""
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"))
"""Instructions that take no time."""
_ALIASES = frozenset(("bitcast", "tuple", "get-tuple-element", "while", "optimization-barrier"))
"""Instructions whose results are in the place of their operands."""
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
        places = re.search(r"input_output_alias=\{(.*?\)) \}", text[: text.find("\n")])
        self._donated = [int(n) for n in re.findall(r"\{(\d+)\}: ", places[1])] if places else []
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
            kinds = [ARRAY.search(shape) for shape in (source.shape if source else "", each.shape)]
            found[" -> ".join(kind[1] if kind else "?" for kind in kinds)] += array_bytes(each.shape)
        return dict(found)

    def work(self, name: str) -> Work | None:
        """Work of the instruction with this name; None if it does not exist."""
        each = self._by_name.get(name)
        if each is None:
            return None
        size = array_bytes(_SCRATCH.sub("", each.shape) if _target(each) else each.shape)
        if each.opcode == "slice-start":  # ((operand), slice, context)
            part = list(ARRAY.finditer(each.shape))[len(each.operands)][0]
            size = array_bytes(part) + array_bytes(re.sub(r"S\(\d+\)", "", part))
        elif each.opcode not in _BOTH:
            size += sum(self._read(each, o) for o in dict.fromkeys(each.operands) if o in self._by_name)
        operations = self._operations(each)
        kind = _target(each) or each.opcode
        if kind == "fusion":
            kind = "fusion with a product" if operations else "fusion, " + (_called_by(each) or "")
        found = ARRAY.search(each.shape)
        return Work(f"{kind} -> {found[0].partition('{')[0] if found else each.shape[:40]}", size, operations)

    def arguments(self) -> int:
        """Bytes of the parameters."""
        return sum(array_bytes(each.shape) for each in self.computations[self.entry] if each.opcode == "parameter")

    def peak(self, computation: str = "") -> int:
        """Bytes of results that are alive at the same time by the schedule, but for those in the place of arguments.

        Without what the allocator loses between them, and without reuse of an operand's place.
        """
        body = self.computations[computation or self.entry]
        owner: dict[str, set[str]] = {}
        last: dict[str, int] = {}
        size: dict[str, int] = {}
        for index, each in enumerate(body):
            seen = {name for operand in each.operands for name in owner.get(operand, ())}
            same = each.opcode in _ALIASES or each.opcode.endswith("-done")
            owner[each.name] = seen if same else {each.name}
            last |= dict.fromkeys(seen | owner[each.name], index)
            size[each.name] = 0 if same or each.opcode in _FREE else array_bytes(each.shape)
            if each.opcode in (*_BOTH, "slice-start"):
                size[each.name] -= sum(array_bytes(self._by_name[operand].shape) for operand in each.operands)
        for index in [] if computation else self._donated:
            result = body[-1].operands[index]
            for name in owner[result]:
                size[name] -= array_bytes(self._by_name[result].shape)
        alive, highest, ends = 0, 0, collections.defaultdict(int)
        for index, each in enumerate(body):
            inside = _bodies(each.rest) if each.opcode in ("while", "call", "conditional") else []
            alive += max(0, size[each.name])
            highest = max(highest, alive + max(map(self.peak, inside), default=0))
            ends[last.get(each.name, index)] += max(0, size[each.name])
            alive -= ends.pop(index, 0)
        return highest

    def _read(self, each: Instruction, operand: str) -> int:
        """Bytes of an operand that an instruction reads: a fusion may use slices of it alone."""
        whole = array_bytes(self._by_name[operand].shape)
        inside = self.computations.get(called(each.rest), []) if each.opcode == "fusion" else []
        number = f"{each.operands.index(operand)})"
        names = {inner.name for inner in inside if inner.opcode == "parameter" and inner.rest.startswith(number)}
        slices = 0
        for inner in inside:
            if inner.opcode == "bitcast" and names.issuperset(inner.operands):
                names.add(inner.name)
            elif inner.opcode in ("slice", "dynamic-slice", "gather") and inner.operands[0] in names:
                slices += array_bytes(inner.shape)
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
                for name in _bodies(each.rest):
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
            inside = self.computations.get(called(each.rest), [])
            return math.fsum(self._operations(inner) or 0 for inner in inside)
        if each.opcode == "convolution":
            return _convolution(each.rest, shapes[0], shapes[1], result)
        if "onv" in target:
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


def _bodies(rest: str) -> list[str]:
    """Computations that a loop, a call or a branch runs."""
    return re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", rest)


def called(rest: str) -> str:
    found = re.search(r"calls=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def _called_by(each: Instruction) -> str:
    """The kind of a fusion, from its name: "loop_convert_fusion" for "loop_convert_fusion.12"."""
    return re.sub(r"[.\d]+$", "", each.name)


def _dimensions(shape: str) -> tuple[int, ...]:
    """Dimensions of the first array."""
    found = ARRAY.search(shape)
    return tuple(int(size) for size in found[3].split(",") if size) if found else ()


def _convolution(rest: str, image: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]) -> float | None:
    """Operations of a convolution without those by padding: TPUs also write batched matrix products so."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if labels is None:
        return None
    window = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
    total = 2.0 * result[labels[3].index("b")] * result[labels[3].index("f")] * kernel[labels[2].index("i")]
    for axis in range(len(result) - 2):
        fields = {name: value.split("x")[axis] for name, value in given.items()}
        outputs, taps = range(result[labels[3].index(str(axis))]), range(int(fields.get("size", 1)))
        stride, dilation, spread = (int(fields.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        before, end = int(fields.get("pad", "0").split("_")[0]), (image[labels[1].index(str(axis))] - 1) * dilation
        places = (output * stride + tap * spread - before for output in outputs for tap in taps)
        total *= sum(0 <= place <= end and place % dilation == 0 for place in places)
    return total


def array_bytes(shape: str) -> int:
    """Bytes in the main memory of a device: with the padding of tiled layouts, without arrays in other memories."""
    return sum(
        math.prod(_padded(sizes, layout)) * max(8, int(bits or 8)) // 8
        for _, bits, sizes, layout in ARRAY.findall(shape)
        if "S(" not in layout
    )


def _padded(sizes: str, layout: str) -> list[int]:
    """Sizes rounded up to the tile of a TPU layout such as {3,0,2,1:T(8,128)}, whose first axis is the fastest."""
    padded, tile = numbers(sizes), re.search(r"T\(([\d,]+)\)", layout)
    axes = numbers(layout.partition(":")[0])
    for axis, unit in zip(axes, reversed(numbers(tile[1] if tile else "")), strict=False):
        padded[axis] = -(-padded[axis] // unit) * unit
    return padded


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
