"""Time from starting the program to the first image on disk: python -m benchmarks.first_image

Every run is a process of its own, `python sample.py --count 1`, which draws from the bundled model: once with an empty
folder for compiled programs, and once more with what the first run left there. Exits with 1 if that exceeds the bound.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BOUND = 10.0
"""Seconds allowed for the median with compiled programs at hand, on a CPU."""


def seconds(folder: Path, output: Path) -> float:
    """One run, with compiled programs kept in `folder`."""
    command = [sys.executable, "sample.py", "--count", "1", "--output", str(output), "--compilation-cache", str(folder)]
    began = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - began
    assert output.is_file()
    output.unlink()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {"empty": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for cache, measured in times.items():
                measured.append(seconds(Path(folder) / "compiled", Path(folder) / "image.png"))
                print(f"{cache}: {measured[-1]:.1f} s", flush=True)
    print(f"\nLoad average of the last minutes: {', '.join(f'{load:.1f}' for load in os.getloadavg())}.\n")
    print("| compiled programs | median s | fastest s | slowest s |\n|---|---|---|---|")
    for cache, measured in times.items():
        print(f"| {cache} | {statistics.median(measured):.1f} | {min(measured):.1f} | {max(measured):.1f} |")
    passed = statistics.median(times["warm"]) <= BOUND
    print(f"\nBound for warm: {BOUND:g} s: {'PASS' if passed else 'FAIL'}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
