"""Communication between devices, parsed from a compiled program."""

import re
from typing import NamedTuple

import numpy as np

from benchmarks.program import ARRAY, Program, array_bytes, called, numbers

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
    fused = {called(each.rest) for body in bodies.values() for each in body if each.opcode == "fusion"}
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
            arrays = [match[0] for match in ARRAY.finditer(shape)]
            if each.opcode != kind and kind != "all-reduce" and len(arrays) > len(each.operands):
                arrays = arrays[len(each.operands) : 2 * len(each.operands)]  # the first half are the operands
            size = sum(array_bytes(array.partition("{")[0]) for array in arrays)
            groups = frozenset(frozenset(map(int, row)) for row in _groups(each.rest))
            found.setdefault(identity, Collective("reduce-scatter" if scattered else kind, size, groups))
    return list(found.values())


def _groups(operation: str) -> np.ndarray | list[list[int]]:
    """The rows of replica_groups, in any of the three ways in which XLA writes them."""
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", operation):  # {{0,1},{2,3}}
        return [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", operation):  # [4,2]<=[2,4]T(1,0)
        return _devices(match[2], numbers(match[1]))
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
    devices = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
    return devices.transpose(numbers(axes) if axes else None).reshape(shape)
