"""docs/papers.md: every name in it is where it says, and no method is missing from it."""

import ast
import re

import pytest

from tests.support import ROOT

TEXT = (ROOT / "docs" / "papers.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))
METHODS = [
    *("curricula.py", "noise_laws.py", "weightings.py", "distances.py", "preconditioning.py", "editing/operators.py"),
    *(f"objectives/{path.name}" for path in sorted((ROOT / "cm_jax" / "objectives").glob("*.py"))),
    *(f"samplers/{path.name}" for path in sorted((ROOT / "cm_jax" / "samplers").glob("*.py"))),
]
"""Modules whose public classes are papers' formulas, but for those that only say what such a class looks like."""
FRAMES = {f"objectives/base.py:{name}" for name in ("Functions", "Batch", "Helpers", "Draws")}
"""Tuples of arguments, which no paper has."""


def defined(body):
    """{name: node} of what a module's or a class's body defines itself."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def module(path):
    return defined(ast.parse((ROOT / "cm_jax" / path).read_text("utf-8")).body)


def test_every_span_of_code_names_something():
    spans = [span for span in re.findall(r"`([^`]+)`", TEXT) if ".py" in span and not span.startswith("tests/")]
    assert len(NAMED) > 90
    assert {f"{path}:{name}" for path, name in NAMED} == set(spans)


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda text: text)
def test_every_name_is_where_it_says(path, name):
    found = module(path)
    for part in name.split("."):
        assert part in found, f"docs/papers.md names {path}:{name}, and there is no {part} there"
        found = defined(getattr(found[part], "body", []))


def test_no_method_is_missing():
    named = {f"{path}:{name.split('.')[0]}" for path, name in NAMED}
    methods = {
        f"{path}:{name}"
        for path in METHODS
        for name, node in module(path).items()
        if isinstance(node, ast.ClassDef) and not name.startswith("_")
        if not any(ast.unparse(base) == "abc.ABC" for base in node.bases)
    }
    assert methods - named <= FRAMES
    assert methods >= FRAMES
