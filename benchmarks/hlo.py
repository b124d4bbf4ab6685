"""Communication between devices, parsed from a compiled program."""

import re
from typing import NamedTuple

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


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
    """Each collective operation in the text of a compiled program."""
    found = []
    for shapes, kind, rest in re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\((.*)", program):
        arrays = [
            (int(bits), np.prod([int(n) for n in dims.split(",") if n]))
            for bits, dims in re.findall(r"[fsu](\d+)\[([\d,]*)\]", shapes)
        ]
        size = sum(bits // 8 * count for bits, count in arrays)
        groups = frozenset(frozenset(map(int, row)) for row in _groups(rest))
        found.append(Collective(kind, int(size), groups))
    return found


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
