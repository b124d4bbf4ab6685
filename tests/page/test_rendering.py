"""Images and texts of the page, without the page."""

import dataclasses
import io
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main_demo
from cm_jax.data.npz import bundled_emoji
from cm_jax.demo import rendering
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.editing import photos
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.networks import ADMUNet
from tests.runs.test_commands import failed

SIDE = 8
SMALL = ADMUNet(
    image_size=SIDE,
    base_channels=32,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    head_dim=32,
    classes=3,
)


@pytest.fixture(scope="module")
def model():
    return Model(
        ModelConfig(SMALL, ConsistencyPreconditioning(), num_levels=18),
        SMALL.prepare(SMALL.initialize(jax.random.key(0))),
    )


def cells(sheet):
    """The images of a grid at the size of the model; each must be enlarged by a whole number."""
    pixels = np.asarray(sheet).astype(int)
    step = 128 + 2
    found = [
        pixels[top : top + 128, left : left + 128]
        for top in range(2, pixels.shape[0] - 128, step)
        for left in range(2, pixels.shape[1] - 128, step)
    ]
    zoom = 128 // SIDE
    for cell in found:
        np.testing.assert_array_equal(cell, cell[::zoom, ::zoom].repeat(zoom, 0).repeat(zoom, 1))
    return np.stack([cell[::zoom, ::zoom] for cell in found])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def some_picture(height=20, width=24):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return rendering.read_picture(png(pixels), "some.png")


def stroke(place, size=(40, 40)):
    layer = np.zeros((*size, 4), np.uint8)
    layer[place] = 255
    return layer


def request(model, seeds="3", label=1, count=5, guidance=None):
    return rendering.read_request(model, seeds, label, count, guidance)


def pictures(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        return {name: np.asarray(Image.open(files.open(name))).astype(int) for name in files.namelist()}


def test_samples_of_one_seed(model):
    sheet, archive, levels = rendering.sample_grid(model, request(model), 2)
    assert cells(sheet).shape == (8, SIDE, SIDE, 3)  # two rows of four, three of them white
    assert (cells(sheet)[5:] == 255).all()
    assert levels.startswith("Noise levels of the 2 steps: 80, ")
    files = pictures(archive)
    assert list(files) == [f"seed3_{index:02d}.png" for index in range(5)]
    np.testing.assert_array_equal(np.stack(list(files.values())), cells(sheet)[:5])


def test_samples_of_several_seeds(model):
    sheet, archive, levels = rendering.sample_grid(model, request(model, "3, 8"), 1)
    assert levels == "Noise level of the step: 80"
    assert list(pictures(archive)) == ["seed3.png", "seed8.png"]
    for seed, cell in zip((3, 8), cells(sheet), strict=True):
        alone, _, _ = rendering.sample_grid(model, request(model, str(seed), count=1), 1)
        np.testing.assert_allclose(cells(alone)[0], cell, atol=1)


def test_the_strip_has_a_row_for_each_number_of_steps(model):
    strip = np.asarray(rendering.steps_strip(model, request(model)))
    rows = cells(strip[:, -4 * 130 - 2 :]).reshape(3, 4, SIDE, SIDE, 3)  # after the names
    for steps, row in zip((1, 2, 4), rows, strict=True):
        expected, _, _ = rendering.sample_grid(model, request(model, count=4), steps)
        np.testing.assert_allclose(row, cells(expected), atol=1)
    assert (rows[0] != rows[1]).mean() > 0.5


def test_guidance_is_offered_where_it_is_possible(model):
    denoiser = dataclasses.replace(model.config, preconditioning=EDMPreconditioning())
    assert rendering.guidance_range(model) is None
    assert rendering.guidance_range(Model(denoiser, model.params)) == (1, 4)
    trained = dataclasses.replace(denoiser, label_dropout=0.0)
    assert rendering.guidance_range(Model(trained, model.params)) is None
    student = dataclasses.replace(
        model.config, network=dataclasses.replace(SMALL, guidance_embedding=True), guidance_range=(1, 3)
    )
    assert rendering.guidance_range(Model(student, model.params)) == (1, 3)
    assert request(model, guidance=1.5).guidance is None


def test_compilation_is_announced_once():
    assert rendering.compiling("a", 1).startswith("Compiling")
    with pytest.raises(ValueError, match="no"), rendering.running("a", 1):
        raise ValueError("no")
    assert rendering.compiling("a", 1)
    with rendering.running("a", 1):
        pass
    assert rendering.compiling("a", 1) == ""
    assert "the last program took" in rendering.compiling("a", 2)


def test_inpainting_preserves_unpainted_pixels(model):
    picture = some_picture()
    shown, about = rendering.canvas_image(model, picture)
    assert about == "center of some.png, 24 x 20 pixels, resized to 8 x 8"
    layer = stroke(np.s_[1:9, 36:], shown.shape[:2])
    known, edited, archive = rendering.edit_grids(model, "Inpaint", picture, [layer], 2, 0, 2, 3)
    assert list(pictures(archive)) == [f"edit{index:02d}_seed0.png" for index in range(3)]
    (picture, known), edited = cells(known), cells(edited)
    zoom = len(shown) // SIDE
    np.testing.assert_array_equal(shown[::zoom, ::zoom], picture)
    hole = layer[..., 3].reshape(SIDE, zoom, SIDE, zoom).any((1, 3))
    np.testing.assert_array_equal(hole, (known != picture).any(-1))
    for edit in edited:
        np.testing.assert_array_equal(edit[~hole], picture[~hole])
        assert (edit != picture)[hole].mean() > 0.9
    assert (edited[0] != edited[1])[hole].mean() > 0.5


def test_the_other_edits_need_no_paint(model):
    (given, gray), _ = map(cells, rendering.edit_grids(model, "Colorize", some_picture(), [], 0, 0, 1, 1)[:2])
    assert np.ptp(gray, axis=-1).max() == 0 < np.ptp(given, axis=-1).max()
    (given, means), _ = map(cells, rendering.edit_grids(model, "Super-resolution", some_picture(), [], 0, 0, 1, 1)[:2])
    np.testing.assert_allclose(means[0, 0], given[:4, :4].mean((0, 1)), atol=1)


def test_large_pictures_are_reduced_without_an_effect_on_fitting():
    pixels = np.random.default_rng(0).integers(0, 256, (2101, 4501, 3), np.uint8)
    kept = rendering.read_picture(png(pixels), "large.png").square
    assert kept.size == (1050, 1050)
    for side in (16, 64, 1024):
        np.testing.assert_array_equal(photos.fit(kept, side), photos.fit(Image.fromarray(pixels), side))


def test_examples_are_held_out():
    arrays = bundled_emoji()
    for name in rendering.EXAMPLES:
        picture, class_name = rendering.example(name)
        same = (arrays["images"] == np.asarray(picture.square)).all((1, 2, 3))
        assert same.any()
        assert arrays["held_out"][same].all()
        assert class_name == arrays["class_names"][arrays["labels"][same][0]]


def test_description_and_classes_of_a_model(model):
    assert rendering.describe_model(model).startswith("consistency model, 8 x 8 pixels, 3 classes, ")
    assert rendering.class_choices(model) == [("0", 0), ("1", 1), ("2", 2)]
    named = dataclasses.replace(model.config, class_names=("dog", "cat", "pea"))
    assert rendering.class_choices(Model(named, model.params))[1] == ("cat", 1)
    alone = dataclasses.replace(model.config, network=dataclasses.replace(SMALL, classes=None))
    assert rendering.class_choices(Model(alone, model.params)) == []


def test_another_model_keeps_the_class_of_the_selected_example(model):
    page = pytest.importorskip("cm_jax.demo.page")
    named = Model(dataclasses.replace(model.config, class_names=("dog", "Flags", "pea")), model.params)
    for shown, example, number in [(named, "flag", 1), (named, "mango", 0), (named, None, 0), (model, "flag", 0)]:
        assert page.show_model(shown, example)[2].value == number


def test_a_picture_that_the_server_has_dropped_is_not_replaced_by_an_example(model):
    page = pytest.importorskip("cm_jax.demo.page")
    blocks = page.page(["small"], lambda name: model)
    assert [each.value for each in blocks.blocks.values() if isinstance(each, page.gr.State)] == [None]
    edits = page.edit(model, "Colorize", None, None, 0, 0, 1, 1)
    for show in (lambda: page.show_picture(model, None), lambda: next(edits)):
        with pytest.raises(InputError, match="no longer has this picture: choose or upload it again"):
            show()


def test_a_model_that_the_page_cannot_edit_with_shows_an_empty_canvas_and_the_reason(model):
    page = pytest.importorskip("cm_jax.demo.page")
    gray = Model(dataclasses.replace(model.config, network=dataclasses.replace(SMALL, image_channels=1)), model.params)
    picture, _, canvas, about = page.use_example(gray, "cat")
    assert (picture.name, canvas) == ("cat", None)
    assert "The page edits square RGB images" in about
    with pytest.raises(InputError, match="The page edits square RGB images"):
        list(page.edit(gray, "Colorize", picture, None, 0, 0, 1, 1))


def test_a_canvas_without_a_value_has_no_paint(model):
    page = pytest.importorskip("cm_jax.demo.page")
    with pytest.raises(InputError, match="Nothing is painted yet"):
        list(page.edit(model, "Inpaint", some_picture(), None, 0, 0, 1, 1))


def test_a_download_is_not_replaced_by_later_ones(tmp_path, monkeypatch):
    page = pytest.importorskip("cm_jax.demo.page")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    paths = [Path(page._file("samples", bytes([number]))["value"]) for number in range(65)]
    assert [path.read_bytes() for path in paths] == [bytes([number]) for number in range(65)]
    assert {path.name for path in paths} == {"samples.zip"}


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("[::1]", "[::1]"), ("localhost", "localhost")])
def test_the_server_requests_its_own_page_at_any_address_and_not_from_a_proxy(monkeypatch, host, shown):
    page = pytest.importorskip("cm_jax.demo.page")
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("NO_PROXY", "")  # the server sets both; monkeypatch restores them
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("ALL_PROXY", "socks5://192.0.2.1")
    monkeypatch.setattr(page.socket, "create_server", lambda *_, **__: io.BytesIO())

    def launch(server_name, server_port, **_):
        with httpx.Client() as client:  # without SOCKS proxies
            return None, str(client.build_request("GET", f"http://{server_name}:{server_port}/").url), None

    blocks, addresses = SimpleNamespace(launch=launch, is_running=False, close=lambda verbose: None), []
    page.serve(blocks, host, 7860, addresses.append)
    assert addresses == [f"http://{shown}:7860/"]


def test_errors(model):
    everywhere = [stroke(np.s_[:, :])]
    denoiser = Model(dataclasses.replace(model.config, preconditioning=EDMPreconditioning()), model.params)
    for call, message in (
        (lambda: rendering.read_picture(b"no picture", "broken.png"), "^broken.png cannot be read as a picture"),
        (lambda: rendering.painted_pixels([]), "Nothing is painted yet"),
        (lambda: rendering.painted_pixels([stroke(np.s_[:0])]), "Nothing is painted yet"),
        (lambda: rendering.sample_grid(model, request(model), 0), "Steps must be"),
        (lambda: request(model, count=17), "Number of images must be"),
        (lambda: rendering.sample_grid(model, request(model, label=3), 2), "A label must be"),
        (lambda: rendering.sample_grid(model, request(model, "-1"), 2), "A seed must be"),
        (lambda: request(model, "3 8"), "Expected a seed or several, separated by commas, got '3 8'"),
        (lambda: request(model, ",".join("1" * 17)), "Number of seeds must be"),
        (lambda: rendering.edit_grids(model, "Inpaint", some_picture(), [], 0, 0, 2, 1), "Nothing is painted yet"),
        (
            lambda: rendering.edit_grids(model, "Inpaint", some_picture(), everywhere, None, 0, 2, 1),
            "class-conditional",
        ),
        (
            lambda: rendering.edit_grids(model, "Inpaint", some_picture(), everywhere, 0, 0, 2, 0),
            "Number of images must be",
        ),
        (
            lambda: rendering.edit_grids(denoiser, "Inpaint", some_picture(), everywhere, 0, 0, 2, 1),
            "Expected a consistency model",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_errors_of_the_command(capsys, monkeypatch):
    assert "There is no checkpoint emoji17" in failed(capsys, main_demo, "emoji17")
    assert "--port must be" in failed(capsys, main_demo, "--port", 0)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command sets it; monkeypatch restores it
    monkeypatch.delitem(sys.modules, "cm_jax.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in failed(capsys, main_demo)
