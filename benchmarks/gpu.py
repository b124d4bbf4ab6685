"""Everything that is asked of a GPU, in one call: python -m benchmarks.gpu --seconds 560 --folder results

First the machine's ceilings, a large product and a large copy; then, most important first, one-step images of the
ImageNet-64 network, its CD step, CIFAR's ECT and sCT steps, the EDM step and the start of a process, in bfloat16,
PyTorch's beside them: eager, and at last compiled, which takes it minutes. Every part has a process of its own and a
share of the time: what a part leaves goes to the later ones, and a part that takes longer is ended, and what it had
found by then counts. What there was no time for can be had by --only. At the end stand the goals, each met, missed or
not measured. --folder keeps all numbers (results.json) and, for sampling and the CD step, the compiled program and its
profile's largest costs.
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

REPOSITORY = Path(__file__).resolve().parent.parent
SHARES = {
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
"""Of the time, a part; in the order in which they run. The last ones get what is left, and need minutes each."""
LEAST = 40
"""Seconds, under which no part is begun."""
EAGER, COMPILED = "PyTorch, eager", "PyTorch, compiled"

Found = dict[str, dict[str, Any]]
"""What each part recorded."""


class Goal(NamedTuple):
    what: str
    bound: float
    most: bool
    """Whether the bound is the most that is allowed, or the least."""
    measured: float | None
    note: str = ""

    @property
    def outcome(self) -> str:
        if self.measured is None or math.isnan(self.measured):
            return "not measured"
        return "met" if (self.measured <= self.bound if self.most else self.measured >= self.bound) else "missed"

    def line(self) -> str:
        measured = "" if self.outcome == "not measured" else f"{self.measured:.4g}"
        bound = f"{self.bound:g} or {'less' if self.most else 'more'}"
        return f"| {self.what} | {bound} | {measured} | {self.outcome} | {self.note} |"


def goals(found: Found) -> Iterator[Goal]:
    """What was asked, from what the parts recorded; ratios are times, ours to PyTorch's best."""
    sampling, cd, edm = (
        {**found.get(f"{name}-compiled", {}), **found.get(name, {})} for name in ("sampling", "cd", "edm")
    )
    batch = f"batch {sampling['batch']}" if sampling.get("batch") else ""
    yield Goal("ImageNet-64 in one step, images/s", 1600, False, sampling.get("images/s"), batch)
    yield Goal("the same, share of the measured matrix peak", 0.45, False, sampling.get("share"), batch)
    yield _to_pytorch("the same, to PyTorch", sampling)
    yield Goal("the same, one image, to PyTorch eager", 0.5, True, sampling.get("latency to eager"))
    batch = f"batch {cd['batch']}" if cd.get("batch") else ""
    yield Goal("CD step of ImageNet-64, images/s", 250, False, cd.get("images/s"), batch)
    yield _to_pytorch("the same, to PyTorch", cd)
    yield _to_pytorch("EDM step of ImageNet-64, to PyTorch", edm)
    ect, sct = found.get("ect", {}), found.get("sct", {})
    for name, part in (("ECT", ect), ("sCT", sct)):
        batch = f"batch {part['batch']}" if part.get("batch") else ""
        yield Goal(f"{name} step of CIFAR-10, images/s", 2000, False, part.get("images/s"), batch)
    both = "images/s" in ect and "images/s" in sct
    yield Goal("sCT's cost to ECT's, an image", 1.1, True, ect["images/s"] / sct["images/s"] if both else None)
    for name, part in (("sampling", sampling), ("CD step", cd), ("EDM step", edm)):
        theirs = [part[f"peak of {rival}"] for rival in (EAGER, COMPILED) if f"peak of {rival}" in part]
        ratio = part["peak"] / min(theirs) if "peak" in part and theirs else None
        yield Goal(f"peak memory of the {name}, to PyTorch's least", 1, True, ratio)
    for name in ("bundled", "ImageNet-64"):
        started = found.get("start", {})
        cold = started.get(f"{name}, none")
        note = f"with nothing compiled {cold:.1f} s" if cold else ""
        yield Goal(
            f"start to first image, {name} network, programs kept, s", 5, True, started.get(f"{name}, kept"), note
        )


def _to_pytorch(what: str, part: dict[str, Any], bound: float = 0.75) -> Goal:
    """By the ratio to the fastest of PyTorch, which is our largest; eager alone may show that it is missed, not met."""
    ratios = {name: part[f"to {name}"] for name in (EAGER, COMPILED) if f"to {name}" in part}
    largest = max(ratios.values(), default=None)
    note = ", ".join(f"{name[9:]} {ratio:.2f}" for name, ratio in ratios.items())
    if COMPILED not in ratios and largest is not None:
        note += ", compiled not measured"
        largest = largest if largest > bound else None
    return Goal(what, bound, True, largest, note)


def run_parts(names: list[str], seconds: float, asked: argparse.Namespace, scratch: Path, found: Found) -> str:
    """Run parts in one process, at most so long, and take in what they recorded; returns why they failed, if so."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_parts", ",".join(names), str(scratch)]
    command += ["--seconds", str(seconds - 2), *(["--small"] if asked.small else [])]
    command += ["--batch", str(found.get("sampling", {}).get("batch", 0))]
    command += ["--folder", str(asked.folder.resolve())] if asked.folder else []
    limits = found.get("ceilings", {})
    if "bytes" in limits:
        command += ["--ceilings", str(limits["operations"]), str(limits["bytes"])]
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),  # profiles read a program that a row compiled
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),  # the steps of EDM and CD share their student
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75" if names[0].startswith("sampling") else "0.92",
        **({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TORCH_COMPILE_DISABLE": "1"} if asked.small else {}),
    }
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **own}, start_new_session=True)
    failure = ""
    try:
        status = process.wait(max(1.0, seconds))
        failure = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        failure = f"ended after its {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
    for name in names:
        records = scratch / f"{name}.json"
        found[name] = {}
        for line in records.read_text().splitlines() if records.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # cut off in the middle
                found[name] |= json.loads(line)
    return failure


def _finite(tree: Any) -> Any:
    """With null for what is not a number, which JSON has no word for."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560, help="that all of it may take")
    parser.add_argument("--only", default=",".join(SHARES), help="parts, with commas between")
    parser.add_argument("--folder", type=Path, help="for numbers, programs and profiles")
    parser.add_argument("--small", action="store_true", help="tiny networks and few repeats, to try it on a CPU")
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    wanted = str(asked.only).split(",")
    if unknown := set(wanted) - set(SHARES):
        parser.error(f"There is no part {', '.join(unknown)}: choose from {', '.join(SHARES)}.")
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    found: Found = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        parts = [name for name in SHARES if name in wanted]
        groups = [parts] if asked.small else [[name] for name in parts]
        for place, names in enumerate(groups):
            left = end - time.monotonic() - 3
            shares = [sum(SHARES[name] for name in group) for group in groups[place:]]
            seconds = min(left, max(1.5 * LEAST, left * shares[0] / sum(shares)))
            if left < LEAST and not asked.small:
                failures |= dict.fromkeys(names, "no time was left")
                continue
            began = time.monotonic()
            print(f"\n## {', '.join(names)} (at most {seconds:.0f} s)", flush=True)
            failure = run_parts(names, seconds, asked, Path(scratch), found)
            print(f"{names[-1]}: {failure or 'done'}, {time.monotonic() - began:.0f} s.", flush=True)
            failures |= dict.fromkeys(names, failure)
            if asked.folder:
                everything = {"found": found, "failures": failures, "goals": [goal._asdict() for goal in goals(found)]}
                (asked.folder / "results.json").write_text(json.dumps(_finite(everything), indent=1) + "\n")
    about = next(iter(found.values()), {})
    small = " Tiny networks: the goals are for others." if asked.small else ""
    print(f"\nOn {about.get('device')}; jax {about.get('jax')}, torch {about.get('torch')}; bfloat16.{small}")
    print("| goal | bound | measured | outcome | |\n|---|---|---|---|---|")
    for goal in goals(found):
        print(goal.line())
    missing = [name for name in parts if failures[name]]
    if missing:
        print(f"Not at their end: {', '.join(f'{name} ({failures[name]})' for name in missing)}.")
        print(f"To measure these: --only {','.join(dict.fromkeys(['ceilings', *missing]))}")


if __name__ == "__main__":
    main()
