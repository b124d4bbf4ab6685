"""Communication between devices, parsed from a compiled program."""

import re

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(program: str) -> list[tuple[str, int]]:
    """(kind, bytes) of each collective operation in the text of a compiled program."""
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\(", program):
        arrays = [
            (int(bits), np.prod([int(n) for n in dims.split(",") if n]))
            for bits, dims in re.findall(r"[fsu](\d+)\[([\d,]*)\]", shapes)
        ]
        found.append((kind, int(sum(bits // 8 * count for bits, count in arrays))))
    return found
