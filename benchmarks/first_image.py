"""Time from process start to the first image on disk: python -m benchmarks.first_image

Each run is a new process of `python sample.py --count 1` with the bundled model: one with an empty compilation cache,
then one with the cache of the first. Exits with 1 if the median with a warm cache exceeds 10 s.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, header, load_average, parser, row

BOUND = 10.0
"""Seconds allowed for the median with a warm compilation cache on CPU."""


def seconds(cache: Path, output: Path) -> float:
    """Duration of one process."""
    command = [sys.executable, "sample.py", "--count", "1", "--output", str(output), "--compilation-cache", str(cache)]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - began
    assert output.is_file()
    output.unlink()
    return elapsed


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5, help="Number of processes per row.")
    repeats = options.parse_args().repeats
    times: dict[str, list[float]] = {"empty": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for cache, measured in times.items():
                measured.append(seconds(Path(folder) / "compiled", Path(folder) / "image.png"))
                print(f"{cache}: {measured[-1]:.1f} s", flush=True)
    print(f"\n{load_average()}\n")
    print(header("Compilation cache", "Median s", "Fastest s", "Slowest s"))
    for cache, measured in times.items():
        print(row(cache, *(f"{value:.1f}" for value in (statistics.median(measured), min(measured), max(measured)))))
    passed = statistics.median(times["warm"]) <= BOUND
    print(f"\nBound for the warm cache: {BOUND:g} s: {'PASS' if passed else 'FAIL'}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
