"""Programs that a command compiles, and what that takes: python -m benchmarks.compilations

Each command runs in a process of its own, first with an empty folder for compiled programs, then with what the first
run left there. Counted are JAX's own events: every program that is traced and lowered, and the seconds of each stage;
with programs at hand the last is that of reading them. The kernels for CPUs are compiled beforehand, and timed apart.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    "sample, 64 images in one step": ["sample", "--count", "64"],
    "sample, two steps": ["sample", "--count", "64", "--steps", "2"],
    "train emoji32-edm, 2 steps": [
        *["train", "emoji32-edm", "--images", "128", "--batch-size", "64", "--sample-every", "1000"],
        *["--network.channel-mult", "1", "2", "4", "--network.base-channels", "32", "--network.blocks-per-level", "1"],
    ],
}

COUNTING = """
import collections, sys
import jax
found = collections.defaultdict(list)
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: found[event].append(seconds))
from cm_jax.cli import main
try:
    main(sys.argv[1:])
finally:
    stages = [found[f"/jax/core/compile/{name}_duration"] for name in (
        "jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")]
    print("COUNTED", len(stages[2]), *map(sum, stages), file=sys.stderr)
"""


def counted(command: list[str], folder: Path) -> list[str]:
    """Number of programs, and seconds of tracing, lowering and compiling."""
    out = ["--run", str(folder / "run")] if command[0] == "train" else ["--output", str(folder / "images.npz")]
    words = [sys.executable, "-c", COUNTING, *command, *out, "--compilation-cache", str(folder / "compiled")]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    lines = [line.split() for line in done.stderr.splitlines() if line.startswith("COUNTED")]
    if done.returncode or not lines:
        sys.exit(done.stderr[-2000:])
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "images.npz").unlink(missing_ok=True)
    return lines[0][1:]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        own = {**os.environ, "XDG_CACHE_HOME": name}
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import jax"], check=True)
        started = time.perf_counter()
        script = "from cm_jax import native; print(native.available())"
        subprocess.run([sys.executable, "-c", script], check=True, env=own, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        print(f"Kernels for CPUs: {time.perf_counter() - started - (started - begun):.1f} s, once a machine.\n")
    print(
        "| command | compiled programs | programs | tracing s | lowering s | compiling s |\n|---|---|---|---|---|---|"
    )
    for row, command in COMMANDS.items():
        with tempfile.TemporaryDirectory() as name:
            for cache in ("none", "at hand"):
                count, *seconds = counted(command, Path(name))
                rounded = " | ".join(f"{float(each):.2f}" for each in seconds)
                print(f"| {row} | {cache} | {count} | {rounded} |", flush=True)
    print(f"\nLoad average {os.getloadavg()[0]:.1f}; this program's own work counts in it.")


if __name__ == "__main__":
    main()
