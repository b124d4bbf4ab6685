"""Run docs/tour.ipynb from top to bottom, and keep what it prints and draws: python -m tools.tour"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from cm_jax.io.atomic import atomic_write

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"
_KEPT = ("image/png", "text/plain")


def read() -> NotebookNode:
    """The notebook, valid."""
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed(notebook: NotebookNode, timeout: float = 600) -> NotebookNode:
    """It with new outputs, from a kernel on one CPU device in an empty folder; the first cell that fails raises."""
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path),
    }
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=timeout, record_timing=False, resources=resources).execute(env=variables)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what compilers say to standard error is of the machine, not of the tour
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            if "data" in output:
                output["data"] = {kind: output["data"][kind] for kind in _KEPT if kind in output["data"]}
    return notebook


def pictures(notebook: NotebookNode) -> list[str]:
    """The PNGs in its outputs, in base 64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    notebook = executed(read())
    notebook.metadata.pop("language_info", None)  # it would name a version of Python
    with atomic_write(TOUR) as beside:
        nbformat.write(notebook, beside)
    print(f"{len(pictures(notebook))} pictures, {TOUR.stat().st_size:,} bytes in all")


if __name__ == "__main__":
    main()
