"""tools/check_words.py: what it reports in each kind of file, and what it must not report."""

import json

import pytest

from tools.check_words import PATTERNS, findings, main

RETIRED = [
    "The model draws images.",
    "the laws of noise levels",
    "a network that judges images",
    "the network's clock",
    "what the network is told",
    "the deviation of the noise",
    "The run goes on.",
    "begins with the teacher's weights",
    "a student that starts from the teacher",
    "a table of classes",
    "each level halves the image",
    "an own component",
    "half the time, beside PyTorch's",
    "as the original does",
    "a checkpoint of ours",
    "values chosen by hand",
    "no GPU was at hand",
    "equal to the last bit",
    "a half-written file",
    "a third less time",
    "labels were wanted",
    "the loop knows its devices",
    "`KarrasGrid` and `noise_laws.py`",
    "train with --start runs/teacher",
    "set CM_JAX_NATIVE=off",
    "it has learnt to colourise grey images",
    "a normalisation layer",
    "under the licence",
    "a file written beside it",
    "what one does with it",
    "c_skip and other scalings",
    "repainting strokes",
    "`AdaptiveRate`",
    "`cm_jax/bundled/emoji32.npz`",
    "convert --to ours",
    "a randomised array",
    "a summarised page",
    "the recognised format",
    *(
        f"train {flag} 2"
        for flag in ("--half", "--accumulate", "--scaling", "--levels", "--averages", "--power-averages")
    ),
    *(f"train {flag} 2" for flag in ("--most-skipped", "--head-width")),
]
CURRENT = [
    "`tests/laws/` holds the tests; tests prove laws; a power law",
    "keys drawn uniformly; sigma is drawn from a log-normal distribution",
    "wall-clock time at a clock rate of 3 GHz",
    "the standard deviation of the noise",
    "the original image and the original size",
    "--start-port 8000 and --num-levels 18",
    "[levels](docs/noise_laws.md) and https://example.org/the-original",
    "strokes, precise noise, otherwise unknown",
    "both images start from the same noise; float16 halves the memory",
]


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("text", RETIRED)
def test_retired_terms_are_found(tmp_path, text):
    assert list(findings(written(tmp_path, "page.md", text)))


def test_every_term_has_an_example():
    assert not [pattern for pattern, _ in PATTERNS if not any(pattern.search(text) for text in RETIRED)]


@pytest.mark.parametrize("text", CURRENT)
def test_current_terms_are_not(tmp_path, text):
    assert not list(findings(written(tmp_path, "page.md", text)))


def test_comments_docstrings_and_messages_of_code(tmp_path):
    code = '"""First line.\n\nIt draws images.\n"""\nlaw = {"law": "draws"}  # the laws\nprint(f"{law} wanted here")\n'
    assert [line for line, _, _ in findings(written(tmp_path, "module.py", code))] == [3, 5, 6]


def test_markdown_of_notebooks_alone(tmp_path):
    cells = [
        {"cell_type": "code", "source": ["# it draws\n"]},
        {"cell_type": "markdown", "source": ["a\n", "it draws"]},
    ]
    assert [line for line, _, _ in findings(written(tmp_path, "tour.ipynb", json.dumps({"cells": cells})))] == [2]


def test_exit_status(tmp_path, capsys):
    assert main([str(written(tmp_path, "good.md", "The model samples images."))]) == 0
    path = written(tmp_path, "bad.md", "\nThe model draws images.")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{path}:2: draws -> sample\n"
