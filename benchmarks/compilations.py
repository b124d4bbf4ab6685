"""Number of programs that a command compiles, and compilation time: python -m benchmarks.compilations

Each command runs twice in its own process: with an empty compilation cache and with the cache of the first run. Counts
and times come from JAX's monitoring events. With a warm cache, "compiling" is the time to load the programs. The CPU
kernels are compiled first and timed separately.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, header, load_average, parser, row

COMMANDS = {
    "sample, 64 images in one step": ["sample", "--count", "64"],
    "sample, 64 images in two steps": ["sample", "--count", "64", "--steps", "2"],
    "train emoji32-edm, 2 steps": [
        *["train", "emoji32-edm", "--images", "128", "--batch-size", "64", "--sample-every", "1000"],
        *["--network.channel-mult", "1", "2", "4", "--network.base-channels", "32", "--network.blocks-per-level", "1"],
    ],
}

COUNTER = """
import collections, sys
import jax
durations = collections.defaultdict(list)
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: durations[event].append(seconds))
from cm_jax.cli import main
try:
    main(sys.argv[1:])
finally:
    stages = [durations[f"/jax/core/compile/{name}_duration"] for name in (
        "jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")]
    print("COUNTED", len(stages[2]), *map(sum, stages), file=sys.stderr)
"""


def compile_counts(command: list[str], folder: Path) -> list[str]:
    """Number of programs; seconds of tracing, lowering and compiling."""
    out = ["--run", str(folder / "run")] if command[0] == "train" else ["--output", str(folder / "images.npz")]
    words = [sys.executable, "-c", COUNTER, *command, *out, "--compilation-cache", str(folder / "compiled")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [line.split() for line in done.stderr.splitlines() if line.startswith("COUNTED")]
    if done.returncode or not lines:
        sys.exit(done.stderr[-2000:])
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "images.npz").unlink(missing_ok=True)
    return lines[0][1:]


def main() -> None:
    parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "XDG_CACHE_HOME": name}
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import jax"], check=True)
        import_seconds = time.perf_counter() - began
        began = time.perf_counter()
        script = "from cm_jax import kernels; print(kernels.available())"
        subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        print(f"CPU kernels: {time.perf_counter() - began - import_seconds:.1f} s, once per machine.\n")
    print(header("Command", "Cache", "Programs", "Tracing s", "Lowering s", "Compiling s"))
    for name, command in COMMANDS.items():
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "warm"):
                count, *seconds = compile_counts(command, Path(folder))
                print(row(name, cache, count, *(f"{float(each):.2f}" for each in seconds)), flush=True)
    print(f"\n{load_average()}")


if __name__ == "__main__":
    main()
