"""`python -m tools.fuzz`: see tools/fuzz/__init__.py."""

import argparse
import faulthandler
import os
import sys
from collections import Counter
from functools import partial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz")
    parser.add_argument("--seconds", type=float, default=600.0, help="total time in seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument("--targets", nargs="*", help="targets whose names contain one of these; default: all")
    parser.add_argument("--number", type=int, help="run this input only")
    args = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
    faulthandler.enable()
    from tools.fuzz.runner import NAMES, fuzz, temporary_workspace

    chosen = [name for name in NAMES if not args.targets or any(part in name for part in args.targets)]
    numbers = range(10**9) if args.number is None else range(args.number, args.number + 1)
    with temporary_workspace() as workspace:
        report = partial(print, flush=True)
        counts = fuzz(workspace, chosen, args.seed, seconds=args.seconds, numbers=numbers, report=report)
    counts["all"] = sum(counts.values(), Counter())
    print(f"{'target':32}{'used':>10}{'refused':>10}{'faults':>10}")
    for name, count in counts.items():
        print(f"{name:32}{count['used']:10,}{count['refused']:10,}{count['fault']:10,}")
    return 1 if counts["all"]["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
