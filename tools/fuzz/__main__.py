"""`python -m tools.fuzz`: see tools/fuzz/__init__.py."""

import argparse
import faulthandler
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz")
    parser.add_argument("--seconds", type=float, default=600.0, help="total time in seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument("--targets", nargs="*", help="targets whose names contain one of these; default: all")
    parser.add_argument("--number", type=int, help="run this input only")
    asked = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    faulthandler.enable()
    from tools.fuzz.fuzzing import names, run, table, workplace

    chosen = [name for name in names() if not asked.targets or any(part in name for part in asked.targets)]
    began = time.monotonic()
    with workplace() as place:
        tallies = run(
            place,
            chosen,
            asked.seed,
            seconds=asked.seconds,
            each=None if asked.number is None else 1,
            first=asked.number or 0,
            report=lambda line: print(line, flush=True),
        )
    print(table(tallies))
    print(f"{time.monotonic() - began:.0f} seconds, seed {asked.seed}.")
    return 1 if any(tally.outcomes["fault"] for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
