"""Run docs/tour.ipynb and store its outputs: python -m tools.tour"""

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
    """The notebook, validated."""
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed(notebook: NotebookNode, timeout: float = 600) -> NotebookNode:
    """The notebook with new outputs, run on one CPU device in an empty folder. Raises for the first cell that fails."""
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
        if cell.cell_type == "code":  # compiler messages depend on the machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            if "data" in output:
                output["data"] = {kind: output["data"][kind] for kind in _KEPT if kind in output["data"]}
    return notebook


def pictures(notebook: NotebookNode) -> list[str]:
    """The PNGs in the outputs, base64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    notebook = executed(read())
    notebook.metadata.pop("language_info", None)  # it contains the Python version
    with atomic_write(TOUR) as temporary:
        nbformat.write(notebook, temporary)
    print(f"{len(pictures(notebook))} images, {TOUR.stat().st_size:,} bytes in total")


if __name__ == "__main__":
    main()
