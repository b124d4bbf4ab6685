"""Costs of a compiled program: combines a profile with the program's text into a table."""

import collections
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.common import header, row
from benchmarks.program import Program, Work


class Ceilings(NamedTuple):
    """Measured limits of the machine."""

    operations: float
    """Operations per second of bfloat16 products."""
    bytes: float
    """Bytes per second to and from memory."""


class Cost(NamedTuple):
    """Cost of all instructions with one label, per pass of the program."""

    label: str
    times: float
    seconds: float
    bytes: float | None
    operations: float | None


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
