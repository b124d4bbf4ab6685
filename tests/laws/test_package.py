"""The wheel contains exactly the package. tools/check_wheel.sh tests the installed wheel."""

import subprocess
import sys
import tarfile
import zipfile

import pytest

from cm_jax import __version__
from tests.support import ROOT

pytest.importorskip("hatchling", reason="the package is built by hatchling: make test installs it")
INFO = f"cm_jax-{__version__}.dist-info"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{path in the wheel: content}, and the paths in the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / f"cm_jax-{__version__}-py3-none-any.whl") as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(folder / f"cm_jax-{__version__}.tar.gz") as source:
        return content, {name.partition("/")[2] for name in source.getnames()}


def test_the_wheel_contains_the_package(built):
    files = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in (ROOT / "cm_jax").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name: content for name, content in built[0].items() if not name.startswith(f"{INFO}/")} == files
    bundled = {f"cm_jax/assets/{name}" for name in ("emoji32.safetensors", "emoji32_edm.safetensors", "emoji16_cd.pt")}
    assert {*bundled, "cm_jax/assets/emoji32.npz", "cm_jax/conversion/rules.py"} <= set(files)


def test_the_wheel_contains_licenses_and_the_command(built):
    for name in ("LICENSE", "NOTICE.md"):
        assert built[0][f"{INFO}/licenses/{name}"] == (ROOT / name).read_bytes()
    assert b"cm-jax = cm_jax.cli:main" in built[0][f"{INFO}/entry_points.txt"]


def test_optional_packages_are_not_required(built):
    lines = built[0][f"{INFO}/METADATA"].decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist")]
    alone = {line.partition(">")[0] for line in required if "extra ==" not in line}
    assert {"jax", "flax", "safetensors"} <= alone
    assert not alone & {"torch", "tensorflow", "tensorflow-datasets", "diffusers", "scipy", "gradio", "matplotlib"}


def test_the_source_distribution_contains_tests(built):
    wanted = {"README.md", "NOTICE.md", "Makefile", "constraints.txt", "sample.py", "convert/__main__.py"}
    wanted |= {"tests/laws/test_package.py", "tests/data/jcm/golden.npz", "docs/papers.md", "tools/check_wheel.sh"}
    assert wanted <= built[1]
    assert not {name for name in built[1] if name.startswith((".venv", "demo/", "dist/"))}
