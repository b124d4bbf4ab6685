"""docs/tour.ipynb runs on a CPU and without downloads."""

import base64
import copy
import io
import os

import pytest
from PIL import Image

pytest.importorskip("nbclient", reason="needs nbclient: make test installs it")
pytest.importorskip("ipykernel", reason="needs ipykernel: make test installs it")

from tools.tour import executed, pictures, read


def sizes(notebook):
    return [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures(notebook)]


def test_the_tour_runs_and_gives_images_of_the_stored_sizes(monkeypatch):
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_backend_optimization_level=0")  # compiling is most of the time
    stored = read()
    again = executed(copy.deepcopy(stored))
    assert len(sizes(stored)) >= 7
    assert sizes(again) == sizes(stored)


def test_it_is_small_and_has_no_local_paths():
    stored = read()
    assert sum(map(len, pictures(stored))) < 400_000
    text = str([cell.get("outputs", ()) for cell in stored.cells])
    assert not [word for word in ("/tmp/", "/home/", "/root/") if word in text]
    assert "site-packages" not in text  # warnings, which name a file of the installation
