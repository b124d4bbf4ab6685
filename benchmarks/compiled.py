"""Sampling and training programs compiled for GPUs and TPUs by their own compilers, on any machine; nothing is run.

    python -m benchmarks.compiled --target h100 --programs imagenet64-forward --batches 1,256
    python -m benchmarks.compiled --target v5e:16x16 --programs imagenet64-cd --batches 8 --parallel mesh,sharded

Needs `pip install -e '.[aot]'` (Linux, x86-64). Programs: imagenet64 or lsun256 with -forward (the network), -gradient
(of its mean squared output), -sample-1 and -sample-2 (a consistency model in one and two steps); training steps by the
names of their presets; imagenet64-meanflow. Batch sizes are per device. Without --programs, the main programs of the
target: sampling in both precisions and training steps, or training steps under pmap, mesh and sharded.

Each program is compiled in its own process with a time limit, and its results are appended to --results, one JSON
object per line. Programs that are already there, from the same commit and versions, are not compiled again; --again
compiles all, and --retry those that failed.

Code generation takes most of the time (95 % for a TPU). It is left out unless --machine-code is given: the program is
optimized, scheduled and placed in memory. TPU programs then have temporaries by their schedule, up to 15 % too low.

Columns. State: arguments of a device. Of memory: arguments, results and temporaries. Traffic: bytes to and from memory,
operands and results of every kernel; slices count as what they read, and a TPU's VMEM does not count. TFLOP: of
products, with those by padding in cuDNN's convolutions. Roofline: the larger of operations / peak and traffic /
bandwidth; then their sum, and the compiler's estimate. Collectives: number and bytes of their results.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.common import ROOT, failure, header, parser, row

HEADER = header(
    *("Program", "Batch", "Precision", "Parallel", "State GB", "Temporaries GB", "Of memory", "TFLOP", "Traffic GB"),
    *("Kernels", "Roofline ms", "Sum ms", "Estimate ms", "Collectives", "Compiled in s"),
)


class Dump(NamedTuple):
    """Files that a compiler writes before it generates code."""

    variable: str
    """Environment variable of its flags."""
    flags: str
    program: str
    after: str
    """Pattern of a file that is written after the program."""


DUMPS = {
    "cuda": Dump(
        "XLA_FLAGS",
        "--xla_dump_to={} --xla_dump_hlo_as_text",
        "*gpu_after_optimizations.txt",
        "*gpu_after_optimizations-memory-usage-report.txt",
    ),
    "tpu": Dump(
        "LIBTPU_INIT_ARGS",
        "--xla_jf_dump_to={} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false",
        "*-TLP-hlo.txt",
        "*-TLP-*-deduplication-map.txt",
    ),
}


def compile_job(fields: dict[str, Any], text: str, folder: str) -> dict[str, Any]:
    """Costs of one job in this process, as JSON values. Writes the compiled program to the file `text`, if any.

    folder: empty, to which the compiler writes the program before it generates code, in another thread.
    """
    from benchmarks.compiled_programs import Job, lowered
    from benchmarks.targets import TARGETS, costs, costs_of_text

    job = Job(**fields)
    target, began = TARGETS[job.target], time.perf_counter()
    dump, dumped = DUMPS[target.platform], Path(folder)
    if folder:
        os.environ[dump.variable] = f"{os.environ.get(dump.variable, '')} {dump.flags.format(folder)}"
    with target.active():
        compiling = concurrent.futures.ThreadPoolExecutor().submit(lowered(job).compile)
        while not compiling.done() and not (folder and any(dumped.glob(dump.after))):
            concurrent.futures.wait([compiling], timeout=0.5)
    if compiling.done():
        found, program = costs(compiling.result()), compiling.result().as_text() or ""
    else:
        program, report = (next(dumped.glob(pattern)).read_text() for pattern in (dump.program, dump.after))
        found = costs_of_text(program)
        if total := re.search(r"Total bytes: (\d+)", report):
            found = found._replace(temporaries=int(total[1]) - found.arguments)
    if text:
        Path(text).write_text(program)
    compute, memory = found.roofline(target, float32=job.precision == "float32")
    return {
        **found._asdict(),
        "traffic": [entry._asdict() for entry in found.traffic],
        "bytes": found.bytes,
        "kernels": found.kernels,
        "fraction": found.memory / target.memory,
        "compute_s": compute,
        "memory_s": memory,
        "machine_code": compiling.done(),
        "compiled_in_s": time.perf_counter() - began,
    }


def versions() -> dict[str, str]:
    """Versions of the checkout, of JAX and of the compilers."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    found = {"cm_jax": done.stdout.strip() if done and not done.returncode else "unknown"}
    for package in ("jax", "jax-cuda13-pjrt", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def in_process(fields: dict[str, Any], limit: float, text: str, machine_code: bool) -> dict[str, Any]:
    """Results of a job that is compiled in its own process, or its failure."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--job", json.dumps(fields), "--text", text]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": limit}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([*command, *([] if machine_code else ["--folder", folder])], **options)
        except subprocess.TimeoutExpired:
            return {"failure": f"not compiled within {limit:.0f} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = done.stderr.strip().splitlines()[-1:]
        return {"failure": f"the process ended with status {done.returncode}: {''.join(last)[:200]}"}


def line(fields: dict[str, Any], found: dict[str, Any]) -> str:
    """A row of the table."""
    precision = fields["precision"] + (", rematerialized" if fields["rematerialize"] else "")
    cells = [fields["program"], fields["batch"], precision, fields["parallel"]]
    if "failure" in found:
        return row(*cells, found["failure"], *[""] * 10)
    sent = ", ".join(f"{number} {kind} {size / 1e9:.3g} GB" for kind, (number, size) in found["collectives"].items())
    times = found["compute_s"], found["memory_s"]
    return row(
        *cells,
        *(f"{found[name] / 1e9:.3g}" for name in ("arguments", "temporaries")),
        f"{found['fraction']:.0%}",
        *(f"{found['operations'] / 1e12:.4g}", f"{found['bytes'] / 1e9:.4g}", found["kernels"]),
        *(f"{1000 * max(times):.1f}", f"{1000 * sum(times):.1f}"),
        f"{1000 * found['estimate']:.1f}" if found.get("estimate") else "",
        sent or "none",
        f"{found['compiled_in_s']:.0f}",
    )


def by_kind(found: dict[str, Any], most: int) -> Iterator[str]:
    """The largest kinds of kernels."""
    for entry in found.get("traffic", [])[:most]:
        yield f"    {entry['bytes'] / 1e9:8.2f} GB, {entry['number']:5} x {entry['kind']}"


def listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",") if text else []
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return names

    return parse


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    from benchmarks.compiled_programs import PARALLEL, Job, main_programs, program_names
    from benchmarks.targets import TARGETS
    from cm_jax.types import Precision

    options = parser(__doc__)
    options.add_argument("--target", choices=TARGETS, default="h100", help="Device and number of devices.")
    lists: dict[str, Any] = {
        "programs": (listed(program_names()), "", "Programs, comma-separated. Default: the main ones."),
        "precisions": (listed(get_args(Precision)), "bfloat16", "Compute precisions, comma-separated."),
        "parallel": (listed(PARALLEL), "one", f"Of training steps, comma-separated: {', '.join(PARALLEL)}."),
        "batches": (integers, "1", "Images per device, comma-separated."),
    }
    for name, (kind, default, help) in lists.items():
        options.add_argument(f"--{name}", type=kind, default=default, help=help)
    options.add_argument("--rematerialize", default="no", choices=("no", "yes", "both"), help="Rematerialize blocks.")
    options.add_argument("--limit", type=float, default=1800, help="Time limit of a program in seconds.")
    options.add_argument("--results", type=Path, default=Path("compiled.jsonl"), help="File of all results.")
    options.add_argument("--retry", action="store_true", help="Compile programs again that failed.")
    options.add_argument("--again", action="store_true", help="Compile all programs again.")
    options.add_argument("--kinds", type=int, default=0, help="Number of kinds of kernels to print, by traffic.")
    options.add_argument("--text", default="", help="File to write the compiled program to; for one program.")
    options.add_argument("--machine-code", action="store_true", help="Generate the machine code, too.")
    options.add_argument("--job", help=argparse.SUPPRESS)
    options.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.job:
        try:
            found = compile_job(json.loads(args.job), args.text, args.folder)
        except Exception as error:
            found = {"failure": failure(error)}
        print(json.dumps(found), flush=True)
        os._exit(0)  # the compiler may be generating code
    found, compiler = versions(), {"cuda": "jax-cuda13-pjrt", "tpu": "libtpu"}[TARGETS[args.target].platform]
    if found[compiler] == "not installed":
        options.error(f"{compiler} is not installed: run `make test-aot`, then .venv-aot/bin/python.")
    print(f"Compiled, not run. {', '.join(' '.join(pair) for pair in found.items())}; target {args.target}.")
    print(HEADER, flush=True)
    remat = {"no": (False,), "yes": (True,), "both": (False, True)}[args.rematerialize]
    chosen = (
        Job(args.target, program, batch, precision, parallel, again)
        for program, precision, parallel, batch, again in itertools.product(
            *(getattr(args, name) for name in lists), remat
        )
    )
    for job in chosen if args.programs else main_programs(args.target):
        fields = dataclasses.asdict(job)
        results = {} if args.again else earlier(args.results, found).get(json.dumps(fields), {})
        if not results or ("failure" in results and args.retry):
            results = in_process(fields, args.limit, args.text, args.machine_code)
            entry = {"job": fields, "versions": found, "date": datetime.date.today().isoformat(), **results}
            with args.results.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        print(line(fields, results), *by_kind(results, args.kinds), sep="\n", flush=True)


def earlier(path: Path, of: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The latest results in a file by job, of the same versions."""
    entries = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {json.dumps(entry["job"]): entry for entry in entries if entry["versions"] == of}


if __name__ == "__main__":
    main()
