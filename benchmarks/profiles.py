"""Costs of a compiled program: combines a profile with the program's text into a table."""

import collections
import gzip
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.common import header, row


class Ceilings(NamedTuple):
    """Measured limits of the machine."""

    operations: float
    """Operations per second of bfloat16 products."""
    bytes: float
    """Bytes per second to and from memory."""


class Work(NamedTuple):
    """Work of one instruction: bytes read and written (each array once) and operations of its products.

    None if unknown.
    """

    label: str
    bytes: float | None = None
    operations: float | None = None


class Cost(NamedTuple):
    """Cost of all instructions with one label, per pass of the program."""

    label: str
    times: float
    seconds: float
    bytes: float | None
    operations: float | None


# The program's text

_LINE = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"))
"""Instructions that take no time."""


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
        current: list[Instruction] = []
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
        result = (
            each.shape.split("]")[0] + "]" if _target(each) else each.shape
        )  # without the scratch space of a library kernel
        size = _bytes(result) + sum(_bytes(self._by_name[o].shape) for o in each.operands if o in self._by_name)
        operations = self._operations(each)
        kind = _target(each) or each.opcode
        if kind == "fusion":
            kind = "fusion with a product" if operations else "fusion, " + (_called_by(each) or "")
        arrays = _ARRAY.search(each.shape)
        return Work(f"{kind} -> {arrays[0] if arrays else each.shape[:40]}", size, operations)

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
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * max(8, int(bits or 8)) // 8
        for _, bits, sizes in _ARRAY.findall(shape)
    )


# The profile


def _events(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(kernel, instruction, seconds) of each GPU kernel; without a GPU, of each instruction."""
    newest = max(folder.glob("**/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}

    def on_gpu(event: dict[str, Any]) -> bool:
        thread = threads.get((event["pid"], event.get("tid")), "")
        return "/device:" in processes.get(event["pid"], "") and thread.startswith("Stream")

    ran = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in ran if on_gpu(event)]
    for event in kernels or [event for event in ran if "hlo_op" in event.get("args", {})]:
        name = event["args"].get("hlo_op", "") if "args" in event else ""
        if not re.match(r"(while|call|conditional)\b", name):  # these contain other instructions
            yield event["name"], name, event["dur"] / 1e6


def costs(folder: Path, program: Program, passes: int) -> list[Cost]:
    """Costs per pass, largest first, from a `jax.profiler` trace of `passes` passes in `folder`."""
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    works: dict[str, list[Work]] = collections.defaultdict(list)
    for kernel, name, duration in _events(folder):
        work = program.work(name) or Work(re.sub(r"<.*", "", kernel)[:60])
        seconds[work.label].append(duration)
        works[work.label].append(work)
    found = [
        Cost(
            label,
            len(seconds[label]) / passes,
            sum(seconds[label]) / passes,
            _total([work.bytes for work in works[label]], passes),
            _total([work.operations for work in works[label]], passes),
        )
        for label in seconds
    ]
    return sorted(found, key=lambda each: -each.seconds)


def _total(values: list[float | None], passes: int) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / passes if len(known) == len(values) else None


def profile(run: Any, program: Program, folder: Path, passes: int = 3) -> list[Cost]:
    """Profile `passes` calls of `run`; traces go to `folder`."""
    with jax.profiler.trace(str(folder)):
        for _ in range(passes):
            run()
    return costs(folder, program, passes)


def table(found: list[Cost], ceilings: Ceilings | None, most: int = 5) -> list[str]:
    """Table of the `most` largest costs, with throughput as a fraction of the two ceilings."""
    whole = sum(each.seconds for each in found)
    lines = [
        *header(
            "Kernel", "Calls per pass", "ms per pass", "Fraction", "Of the memory ceiling", "Of the matrix ceiling"
        ).splitlines(),
    ]
    for each in found[:most]:
        fractions = [
            f"{done / each.seconds / most_possible:.2f}" if done and each.seconds and ceilings else ""
            for done, most_possible in (
                (each.bytes, ceilings.bytes if ceilings else 1),
                (each.operations, ceilings.operations if ceilings else 1),
            )
        ]
        lines.append(
            row(
                *(f"`{each.label}`", f"{each.times:.1f}", f"{1000 * each.seconds:.3f}"),
                *(f"{each.seconds / whole:.2f}", *fractions),
            )
        )
    return [*lines, f"Total: {1000 * whole:.3f} ms of device time per pass, {len(found)} kinds of kernels."]
