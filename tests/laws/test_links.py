"""Links between the Markdown pages lead somewhere, and files that they name exist."""

import re

import pytest

from tests.support import ROOT

PAGES = sorted(path for folder in (".", "docs", "benchmarks", "tests/data") for path in (ROOT / folder).glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:cm_jax|tests|docs|tools|benchmarks|convert)/[\w./-]+)`")


def without_code(page):
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub makes of headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page)):
        if not link.startswith(("http:", "https:", "mailto:")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            if anchor:
                assert anchor in anchors(target), f"{page.name} links to {link}; {target.name} has {anchors(target)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    missing = [name for name in FILE.findall(without_code(page)) if not (ROOT / name).exists()]
    assert not missing


def test_the_tree_of_modules_is_complete():
    """docs/architecture.md lists all files and folders at the top of the package, and what it lists exists."""
    tree = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("```")[1].partition("\n\n")[0]
    listed = set(re.findall(r"\b\w+(?:/|\.py)(?=\s)", tree)) - {"cm_jax/"}
    top = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "cm_jax").iterdir()} - {"__pycache__/"}
    assert top <= listed
    assert not [name for name in listed if not list((ROOT / "cm_jax").rglob(name.rstrip("/")))]
