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
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    faulthandler.enable()
    from tools.fuzz.runner import names, run, table, temporary_workspace

    chosen = [name for name in names() if not args.targets or any(part in name for part in args.targets)]
    began = time.monotonic()
    with temporary_workspace() as workspace:
        tallies = run(
            workspace,
            chosen,
            args.seed,
            seconds=args.seconds,
            each=None if args.number is None else 1,
            first=args.number or 0,
            report=lambda line: print(line, flush=True),
        )
    print(table(tallies))
    print(f"{time.monotonic() - began:.0f} seconds, seed {args.seed}.")
    return 1 if any(tally.outcomes["fault"] for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
