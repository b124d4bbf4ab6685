"""Imports point one way, and the library stands without PyTorch, TensorFlow and a command line."""

import ast
import subprocess
import sys

from tests.support import ROOT

ORDER = [
    "errors",
    "types",
    "io",
    "data",
    "diffusion",
    "kernels",
    "networks",
    "feature_networks",
    "checkpoints",
    "conversion",
    "samplers",
    "objectives",
    "editing",
    "model",
    "loading",
    "evaluation",
    "training",
    "presets",
    "demo",
    "cli",
]
"""Every module of the package; each may import those before it. docs/architecture.md draws the same order."""


def modules():
    """All but `__main__`, which is a door to cm_jax.cli as sample.py is."""
    paths = {path for path in (ROOT / "cm_jax").rglob("*.py") if path.name != "__main__.py"}
    return {path for path in paths if path.name != "__init__.py" or path.parent.name in ORDER}


def place(path):
    return path.relative_to(ROOT / "cm_jax").with_suffix("").parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cm_jax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cm_jax.")]


def test_every_module_has_its_place():
    assert {place(path) for path in modules()} - {"assets"} == set(ORDER)


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        if place(path) != "assets"
        for name in imported(path)
        if ORDER.index(name) > ORDER.index(place(path))
    ]
    assert not wrong


def test_flax_and_orbax_stay_in_their_places():
    for path in modules():
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert "flax" not in names or place(path) in ("networks", "feature_networks")
        assert "orbax" not in names or place(path) == "checkpoints"
        assert "tyro" not in names or place(path) == "cli"
        assert "gradio" not in names or (place(path), path.name) == ("demo", "page.py")


def test_sampling_needs_neither_torch_nor_tensorflow_nor_a_command_line():
    script = """
import sys
for name in ("torch", "tensorflow", "diffusers", "tyro", "tensorflow_datasets", "grain", "gradio"):
    sys.modules[name] = None
import cm_jax
images = cm_jax.load().sample(0, 2, steps=2)
assert images.shape == (2, 32, 32, 3)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
