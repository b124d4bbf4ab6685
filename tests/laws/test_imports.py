"""Imports go in one direction, and sampling does not import optional packages."""

import ast
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

ORDER = [
    "errors",
    "types",
    "arguments",
    "progress",
    "parallelism",
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
    "exporting",
    "evaluation",
    "training",
    "presets",
    "demo",
    "cli",
]
"""Modules and folders of cm_jax/. Each may import only those before it."""

FOLDERS = {
    "flax": ("networks/", "feature_networks/"),
    "orbax": ("checkpoints/",),
    "tyro": ("cli/",),
    "gradio": ("demo/page.py",),
    "huggingface_hub": ("checkpoints/hub", "conversion/push.py", "conversion/model_card.py"),
}
"""Third-party packages, and where cm_jax may import them."""

PACKAGE = ROOT / "cm_jax"


def modules():
    """Paths relative to cm_jax/ of all modules. `__init__.py` of the package and `__main__.py` are entry points."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(path for path in paths if path.name != "__main__.py" and str(path) != "__init__.py")


def imports(path):
    """Full names that a module imports, also within functions: a.b for `import a.b`, a.b.c for `from a.b import c`."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def top(path):
    """The module or folder at the top of cm_jax/ to which a path belongs."""
    return path.with_suffix("").parts[0]


def test_every_module_has_a_place_in_the_order():
    assert {top(path) for path in modules()} - {"assets"} == set(ORDER)


def test_documentation_lists_modules_in_import_order():
    tree = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("\ncm_jax/\n")[2].partition("\n\n")[0]
    lines = re.findall(r"^  (\w+(?:\.py|/)(?: +\w+(?:\.py|/))*)", tree, re.MULTILINE)
    listed = [re.split(r"[./]", name)[0] for line in lines for name in line.split()]
    assert [name for name in listed if name not in ("__init__", "assets")] == ORDER


def test_the_package_has_fewer_than_ten_modules_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) < 10


def test_modules_import_only_modules_above_their_own():
    wrong = []
    for path in modules():
        for name in imports(path):
            assert not name.startswith("."), f"{path} has a relative import of {name}"
            if name.startswith("cm_jax.") and ORDER.index(name.split(".")[1]) > ORDER.index(top(path)):
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_training_run_does_not_import_the_training_loop():
    wrong = [
        f"{path} imports {name}"
        for path in modules()
        if path.is_relative_to("training/run")
        for name in imports(path)
        if f"{name}.".startswith("cm_jax.training.loop.")
    ]
    assert not wrong


@pytest.mark.parametrize("package", FOLDERS)
def test_third_party_packages_are_imported_only_in_their_folders(package):
    paths = {path.as_posix() for path in modules() if package in {name.split(".")[0] for name in imports(path)}}
    assert paths
    assert not {path for path in paths if not path.startswith(FOLDERS[package])}


def test_sampling_imports_no_optional_package():
    script = """
import sys
for name in ("torch", "tensorflow", "diffusers", "tyro", "tensorflow_datasets", "grain", "gradio", "huggingface_hub"):
    sys.modules[name] = None
import cm_jax
images = cm_jax.load().sample(0, 2, steps=2)
assert images.shape == (2, 32, 32, 3)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
