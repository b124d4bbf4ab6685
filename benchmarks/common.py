"""Helpers of the benchmarks: command-line parser, table rows, load average and memory of a process."""

import argparse
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the module's docstring unchanged."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*columns: str) -> str:
    """The header and separator of a Markdown table."""
    return f"{row(*columns)}\n{'|---' * len(columns)}|"


def load_average(before: float | None = None) -> str:
    """A line with the one-minute load average."""
    now = f"{os.getloadavg()[0]:.1f}"
    value = now if before is None else f"{before:.1f} before and {now} after"
    return f"Load average: {value}, including this program."


def failure(error: Exception) -> str:
    """Type and first line of an exception, for a table cell."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def process_memory(field: str) -> float:
    """Bytes of this process from Linux's /proc/self/status: "VmRSS" is current, "VmHWM" peak. NaN elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else float("nan")
