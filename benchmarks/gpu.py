"""All GPU measurements in one call: python -m benchmarks.gpu --seconds 560 --folder results

Measures the ceilings of the machine (a large matrix product, a large copy); then, most important first, in bfloat16:
one-step images of the ImageNet-64 network, its CD step, the ECT and sCT steps of CIFAR-10, the EDM step, the time to
the first image, each compared with eager PyTorch, and last with torch.compile, which takes minutes.

Each part runs in its own process with a share of the time; unused time goes to later parts. A part that exceeds its
share is ended, and its results so far count. --only runs the parts that were left out. The output ends with a table of
goals: met, missed or not measured. --folder stores all numbers (results.json) and, for sampling and the CD step, the
compiled program and its profile.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, header, parser, row

TIME_SHARES = {
    "ceilings": 4,
    "sampling": 24,
    "cd": 28,
    "ect": 8,
    "sct": 9,
    "edm": 14,
    "start": 10,
    "sampling-compiled": 8,
    "cd-compiled": 3,
    "edm-compiled": 2,
}
"""Weight of each part in the available time, in running order. The last three get the remaining time."""
MIN_SECONDS = 40
"""A part does not start with less time left."""
EAGER, COMPILED = "PyTorch, eager", "PyTorch, compiled"

Results = dict[str, dict[str, Any]]
"""Recorded results of each part."""


class Goal(NamedTuple):
    name: str
    bound: float
    is_maximum: bool
    """Whether the bound is a maximum, or a minimum."""
    measured: float | None
    note: str = ""

    @property
    def outcome(self) -> str:
        if self.measured is None or math.isnan(self.measured):
            return "not measured"
        return "met" if (self.measured <= self.bound if self.is_maximum else self.measured >= self.bound) else "missed"

    def line(self) -> str:
        measured = "" if self.outcome == "not measured" else f"{self.measured:.4g}"
        bound = f"{self.bound:g} or {'less' if self.is_maximum else 'more'}"
        return row(self.name, bound, measured, self.outcome, self.note)


def goals(found: Results) -> Iterator[Goal]:
    """Goals and their measured values. Ratios are times of cm_jax over times of the fastest PyTorch variant."""
    sampling, cd, edm = (
        {**found.get(f"{name}-compiled", {}), **found.get(name, {})} for name in ("sampling", "cd", "edm")
    )
    batch = f"batch {sampling['batch']}" if sampling.get("batch") else ""
    yield Goal("ImageNet-64, one step, images/s", 1600, False, sampling.get("images/s"), batch)
    yield Goal("ImageNet-64, one step, fraction of the matrix ceiling", 0.45, False, sampling.get("share"), batch)
    yield _to_pytorch("ImageNet-64, one step, time / PyTorch", sampling)
    yield Goal("ImageNet-64, one step, one image, time / eager PyTorch", 0.5, True, sampling.get("latency to eager"))
    batch = f"batch {cd['batch']}" if cd.get("batch") else ""
    yield Goal("ImageNet-64, CD step, images/s", 250, False, cd.get("images/s"), batch)
    yield _to_pytorch("ImageNet-64, CD step, time / PyTorch", cd)
    yield _to_pytorch("ImageNet-64, EDM step, time / PyTorch", edm)
    ect, sct = found.get("ect", {}), found.get("sct", {})
    for name, part in (("ECT", ect), ("sCT", sct)):
        batch = f"batch {part['batch']}" if part.get("batch") else ""
        yield Goal(f"CIFAR-10, {name} step, images/s", 2000, False, part.get("images/s"), batch)
    both = "images/s" in ect and "images/s" in sct
    yield Goal(
        "CIFAR-10, sCT time / ECT time per image", 1.1, True, ect["images/s"] / sct["images/s"] if both else None
    )
    for name, part in (("sampling", sampling), ("CD step", cd), ("EDM step", edm)):
        peaks = [part[f"peak of {rival}"] for rival in (EAGER, COMPILED) if f"peak of {rival}" in part]
        ratio = part["peak"] / min(peaks) if "peak" in part and peaks else None
        yield Goal(f"Peak memory of the {name} / lowest of PyTorch", 1, True, ratio)
    for name in ("bundled", "ImageNet-64"):
        started = found.get("start", {})
        cold = started.get(f"{name}, empty")
        note = f"empty cache {cold:.1f} s" if cold else ""
        yield Goal(f"Seconds to first image, {name} network, warm cache", 5, True, started.get(f"{name}, warm"), note)


def _to_pytorch(name: str, part: dict[str, Any], bound: float = 0.75) -> Goal:
    """A goal for the ratio to the fastest PyTorch variant. Eager alone can show that it is missed, but not met."""
    ratios = {rival: part[f"to {rival}"] for rival in (EAGER, COMPILED) if f"to {rival}" in part}
    largest = max(ratios.values(), default=None)
    note = ", ".join(f"{rival[9:]} {ratio:.2f}" for rival, ratio in ratios.items())
    if COMPILED not in ratios and largest is not None:
        note += ", compiled not measured"
        largest = largest if largest > bound else None
    return Goal(name, bound, True, largest, note)


def run_parts(names: list[str], seconds: float, args: argparse.Namespace, scratch: Path, results: Results) -> str:
    """Run parts in one process for at most `seconds` and add their results; returns a failure message or ""."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_parts", ",".join(names), str(scratch)]
    command += ["--seconds", str(seconds - 2), *(["--small"] if args.small else [])]
    command += ["--batch", str(results.get("sampling", {}).get("batch", 0))]
    command += ["--folder", str(args.folder.resolve())] if args.folder else []
    limits = results.get("ceilings", {})
    if "bytes" in limits:
        command += ["--ceilings", str(limits["operations"]), str(limits["bytes"])]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),  # the profile reuses the compiled program
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),  # EDM and CD have the same student
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75" if names[0].startswith("sampling") else "0.92",
        **({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TORCH_COMPILE_DISABLE": "1"} if args.small else {}),
    }
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True)
    failure = ""
    try:
        status = process.wait(max(1.0, seconds))
        failure = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        failure = f"ended after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its subprocesses
        process.wait()
    for name in names:
        records = scratch / f"{name}.json"
        results[name] = {}
        for line in records.read_text().splitlines() if records.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # incomplete line
                results[name] |= json.loads(line)
    return failure


def _finite(tree: Any) -> Any:
    """Replace NaN and infinities by None, because JSON cannot represent them."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=560, help="Time limit in seconds.")
    options.add_argument("--only", default=",".join(TIME_SHARES), help="Parts to run, comma-separated.")
    options.add_argument("--folder", type=Path, help="Folder of results, compiled programs and profiles.")
    options.add_argument("--small", action="store_true", help="Use tiny networks and few repeats, to test on a CPU.")
    args = options.parse_args()
    end = time.monotonic() + args.seconds
    chosen = str(args.only).split(",")
    if unknown := set(chosen) - set(TIME_SHARES):
        options.error(f"Unknown parts in --only: {', '.join(sorted(unknown))}. Choose from {', '.join(TIME_SHARES)}.")
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        parts = [name for name in TIME_SHARES if name in chosen]
        groups = [parts] if args.small else [[name] for name in parts]
        for place, names in enumerate(groups):
            left = end - time.monotonic() - 3
            shares = [sum(TIME_SHARES[name] for name in group) for group in groups[place:]]
            seconds = min(left, max(1.5 * MIN_SECONDS, left * shares[0] / sum(shares)))
            if left < MIN_SECONDS and not args.small:
                failures |= dict.fromkeys(names, "no time left")
                continue
            began = time.monotonic()
            print(f"\n## {', '.join(names)} (at most {seconds:.0f} s)", flush=True)
            failure = run_parts(names, seconds, args, Path(scratch), results)
            print(f"{names[-1]}: {failure or 'done'}, {time.monotonic() - began:.0f} s.", flush=True)
            failures |= dict.fromkeys(names, failure)
            if args.folder:
                report = {"found": results, "failures": failures, "goals": [goal._asdict() for goal in goals(results)]}
                (args.folder / "results.json").write_text(json.dumps(_finite(report), indent=1) + "\n")
    about = next(iter(results.values()), {})
    small = " Tiny networks: the goals do not apply." if args.small else ""
    print(f"\nOn {about.get('device')}; jax {about.get('jax')}, torch {about.get('torch')}; bfloat16.{small}")
    print(header("Goal", "Bound", "Measured", "Outcome", "Note"))
    for goal in goals(results):
        print(goal.line())
    missing = [name for name in parts if failures[name]]
    if missing:
        print(f"Not finished: {', '.join(f'{name} ({failures[name]})' for name in missing)}.")
        print(f"To measure them: --only {','.join(dict.fromkeys(['ceilings', *missing]))}")


if __name__ == "__main__":
    main()
