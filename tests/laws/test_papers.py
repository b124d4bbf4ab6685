"""docs/papers.md: every row has a location, every function in it exists, and no method of the library is missing."""

import ast
import re

import pytest

from tests.support import ROOT

TEXT = (ROOT / "docs" / "papers.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))
ROWS = [line for line in TEXT.splitlines() if line.startswith("|") and not line.startswith("|---")]
HEAD = "| Formula | Location | Function |"
LOCATION = re.compile(r"(eqs?\.|sections?|algorithms?|tables?|appendix) [\dA-Z]|code: \w")
METHODS = [
    *(f"diffusion/{name}.py" for name in ("curricula", "noise_distributions", "losses", "preconditioning")),
    "editing/operators.py",
    *(f"objectives/{path.name}" for path in sorted((ROOT / "cm_jax" / "objectives").glob("*.py"))),
    *(f"samplers/{path.name}" for path in sorted((ROOT / "cm_jax" / "samplers").glob("*.py"))),
]
"""Modules whose public classes implement formulas of papers, except abstract classes."""
NOT_METHODS = {"abc.ABC", "NamedTuple", "Protocol", "TypedDict"}
"""Bases of abstract classes and of groups of arguments, which no paper defines."""
RECORDS = {"objectives/base.py:Models"}
"""Other groups of arguments."""


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


def test_every_code_span_names_a_function():
    spans = [span for span in re.findall(r"`([^`]+)`", TEXT) if ".py" in span and not span.startswith("tests/")]
    assert len(NAMED) > 90
    assert {f"{path}:{name}" for path, name in NAMED} == set(spans)


@pytest.mark.parametrize("row", [row for row in ROWS if row != HEAD])
def test_every_row_has_a_formula_a_location_and_a_function(row):
    formula, location, function = (cell.strip() for cell in row.strip("|").split("|"))
    assert formula
    assert LOCATION.search(location), f"docs/papers.md gives no location for {formula}"
    assert all(re.fullmatch(r"`[\w/]+\.py:[\w.]+`", span) for span in function.split())
    assert function


def test_every_table_has_the_same_head():
    assert ROWS.count(HEAD) == sum(line.startswith("|---") for line in TEXT.splitlines()) > 10


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda text: text)
def test_every_function_exists(path, name):
    found = module(path)
    for part in name.split("."):
        assert part in found, f"docs/papers.md names {path}:{name}, but {path} does not define {part}"
        found = defined(getattr(found[part], "body", []))


def test_no_method_is_missing():
    named = {f"{path}:{name.split('.')[0]}" for path, name in NAMED}
    methods = {
        f"{path}:{name}"
        for path in METHODS
        for name, node in module(path).items()
        if isinstance(node, ast.ClassDef) and not name.startswith("_")
        if not NOT_METHODS & set(map(ast.unparse, node.bases))
    }
    assert methods - named <= RECORDS
    assert methods >= RECORDS
