"""The page in a headless browser: it loads, samples, inpaints, and shows errors."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.demo import rendering
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.model import Model
from tests.page.test_rendering import SMALL
from tests.support import ROOT, run

CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install '.[test]')"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (on Debian: apt-get install chromium)"),
]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 600
"""Timeout in seconds, for a busy machine."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The bundled model, a small unconditional one, one of gray images, and a damaged one."""
    folder = tmp_path_factory.mktemp("models")
    for name, channels in (("small", 3), ("gray", 1)):
        network = dataclasses.replace(SMALL, classes=None, image_channels=channels)
        config = ModelConfig(network, ConsistencyPreconditioning(), num_levels=18)
        Model(config, network.prepare(network.initialize(jax.random.key(0)))).save(folder / name)
    (folder / "damaged.pt").write_bytes(b"no checkpoint")
    return ["emoji16_cd", *(str(folder / name) for name in ("small", "gray", "damaged.pt"))]


@contextlib.contextmanager
def served(arguments, log, temporary, stop=signal.SIGINT):
    """The address of the page, served by its own process, which must exit without errors when it is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary.mkdir()
    own = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "TMPDIR": str(temporary), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "cm_jax.demo", *arguments, "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT)
    try:
        until(lambda: b"The page is at" in log.read_bytes() or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(stop)
        try:
            status = server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGABRT)  # writes the stacks of its threads to the log
            status = server.wait()
        assert status == 0, log.read_text()
        assert "Traceback" not in log.read_text()
        assert not list(temporary.iterdir())
    finally:
        server.kill()


@pytest.fixture(scope="module")
def address(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with served(checkpoints, folder / "log", folder / "temporary") as address:
        yield address


@pytest.fixture(scope="module")
def page(address):
    """The open page, which may request nothing from other machines, and whose scripts may raise no errors."""
    from playwright.sync_api import sync_playwright

    requests, failures = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1280, "height": 920})
        opened.set_default_timeout(PATIENCE * 1000)
        opened.on("request", lambda request: requests.append(request.url))
        opened.on("pageerror", lambda error: failures.append(str(error)))
        opened.goto(address)
        opened.get_by_text("consistency model, 16 x 16 pixels, 9 classes").wait_for()
        yield opened
        browser.close()
    assert failures == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def screenshot(page, tmp_path):
    folder = Path(os.environ.get("CM_JAX_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: page.screenshot(path=folder / f"{name}.png")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def choose(page, label, option):
    """Choose an option of the visible list with this label."""
    page.get_by_label(label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option, exact=True).click()


def shown(page, label):
    """The image below a label, once it is there."""
    image = page.locator(".block", has=page.get_by_text(label, exact=True)).locator("img")
    image.wait_for()
    answer = page.request.get(image.get_attribute("src"))
    return np.asarray(Image.open(io.BytesIO(answer.body()))).astype(int)


def message(page):
    """The text of the only message on the page, which is closed."""
    toast = page.locator(".toast-body")
    toast.wait_for()
    text = toast.inner_text()
    toast.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")
    return text


def wait_for(page, text):
    page.get_by_text(text, exact=True).wait_for()


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def cleared(page, label):
    """The image below a label disappears."""
    page.locator(".block", has=page.get_by_text(label, exact=True)).locator("img").wait_for(state="detached")


def downloaded(page, name):
    """The images of a downloaded .zip file."""
    with page.expect_download() as download:
        page.get_by_text(name, exact=True).click()
    with zipfile.ZipFile(download.value.path()) as files:
        return [np.asarray(Image.open(files.open(each))).astype(int) for each in files.namelist()]


def test_sampling_and_the_effect_of_steps(page, screenshot):
    choose(page, "Class", "Flags")
    page.get_by_label("Seed").locator("visible=true").fill("7")
    press(page, "Sample")
    page.get_by_text("Compiling for these settings").wait_for()
    found = shown(page, "Samples"), shown(page, "The same noise in one, two and four steps")
    model = cm_jax.load("emoji16_cd")
    request = rendering.read_request(model, "7", 8, 16, None)
    sheet, archive, levels = rendering.sample_grid(model, request, 2)
    wait_for(page, levels)
    for picture, expected in zip(found, (sheet, rendering.steps_strip(model, request)), strict=True):
        np.testing.assert_allclose(picture, np.asarray(expected), atol=1)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        expected = np.asarray(Image.open(files.open("seed7_03.png")))
    images = downloaded(page, "Download the samples (.zip)")
    assert len(images) == 16
    np.testing.assert_allclose(images[3], expected, atol=1)
    screenshot("sample")


def test_an_error_clears_the_results(page):
    page.get_by_label("Seed").locator("visible=true").fill("-1")
    press(page, "Sample")
    assert "A seed must be a whole number" in message(page)
    cleared(page, "Samples")
    cleared(page, "The same noise in one, two and four steps")


def test_several_seeds_alone(page, screenshot):
    page.get_by_label("Seed").locator("visible=true").fill("7, 3")
    page.get_by_label("Compare one, two and four steps").uncheck()
    press(page, "Sample")
    assert shown(page, "Samples").shape == (132, 262, 3)
    screenshot("seeds")


def open_and_paint(page, picture):
    """Open the tab of edits, and paint over its first picture when that is shown with this description."""
    page.get_by_role("tab", name="Edit").click()
    wait_for(page, picture)
    until(lambda: canvas_colors(page) == (True, False))
    paint(page)
    until(lambda: canvas_colors(page) == (True, True))


def paint(page):
    """A stroke over the cat's mouth, with the mouse."""
    box = page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.65
    page.mouse.move(x - 70, y)
    page.mouse.down()
    page.mouse.move(x + 70, y, steps=8)
    page.mouse.up()


def canvas_colors(page):
    """Whether the canvas contains the yellow cat, and whether it contains paint."""
    file = io.BytesIO(page.locator("canvas").first.screenshot())
    red, green, blue = np.moveaxis(np.asarray(Image.open(file).convert("RGB")), -1, 0)
    yellow = (red > 200) & (green > 150) & (blue < 80)
    pink = (red > 200) & (green < 40) & (blue > 80)
    return bool(yellow.mean() > 0.1), bool(pink.mean() > 0.01)


def test_inpainting(page, screenshot):
    open_and_paint(page, "cat, 32 x 32 pixels, resized to 16 x 16")
    press(page, "Clear canvas")
    until(lambda: canvas_colors(page) == (True, False))
    press(page, "Edit")
    assert "Nothing is painted yet" in message(page)
    paint(page)
    press(page, "Edit")
    edits = shown(page, "Edits")
    picture, known = shown(page, "Input and known part")[2:].reshape(2, 130, 132, 3)[:, :128, 2:130]
    hole = (picture != known).any(-1)
    assert 0.05 < hole.mean() < 0.25
    changed = []
    for top, left in np.ndindex(2, 4):
        edit = edits[2 + 130 * top :, 2 + 130 * left :][:128, :128]
        np.testing.assert_array_equal(edit[~hole], picture[~hole])
        changed.append((edit != picture).any(-1)[hole].mean())
    assert min(changed) > 0.5
    np.testing.assert_array_equal(downloaded(page, "Download the edits (.zip)")[1], edits[2:130:8, 132:260:8])
    screenshot("inpaint")


def test_a_broken_upload_and_another(page, screenshot, tmp_path):
    (tmp_path / "<b>broken.png").write_bytes(b"no picture")
    page.get_by_test_id("Upload a picture-upload-button").set_input_files(tmp_path / "<b>broken.png")
    page.locator(".toast-body").wait_for()
    page.wait_for_timeout(500)  # fade-in
    screenshot("broken_upload")
    text = message(page)
    cleared(page, "Edits")
    cleared(page, "Input and known part")
    assert "broken.png cannot be read as a picture: expected one of the formats" in text
    assert "Traceback" not in text
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    page.get_by_test_id("Upload a picture-upload-button").set_input_files(tmp_path / "red.png")
    wait_for(page, "center of red.png, 40 x 30 pixels, resized to 16 x 16")


def test_another_model(page, checkpoints):
    _, small, gray, damaged = checkpoints
    choose(page, "Model", damaged)
    assert "damaged.pt" in message(page)
    choose(page, "Model", gray)
    page.get_by_text("The page edits square RGB images, got a model of 8 x 8 pixels and 1 channels").wait_for()
    press(page, "Edit")
    assert "The page edits square RGB images" in message(page)
    choose(page, "Model", small)
    page.get_by_text("consistency model, 8 x 8 pixels, unconditional").wait_for()
    wait_for(page, "center of red.png, 40 x 30 pixels, resized to 8 x 8")
    assert page.get_by_label("Class").locator("visible=true").count() == 0


def test_a_port_in_use(address):
    port = address.rstrip("/").rpartition(":")[2]
    done = run("-m", "cm_jax.demo", "--port", port)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"Cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine(host):
    done = run("-m", "cm_jax.demo", "--host", host)
    assert done.returncode == 2
    progress, error = done.stderr.splitlines()
    assert progress == "Starting the page ..."
    assert error.startswith("error: Cannot listen on ")


def test_a_stop_while_an_open_page_is_sampling(tmp_path):
    arguments, places = ["emoji16_cd", "--compilation-cache", "off"], (tmp_path / "log", tmp_path / "temporary")
    with contextlib.ExitStack() as open_pages, served(arguments, *places, signal.SIGTERM) as address:

        def ask(path, body=None):
            request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
            return open_pages.enter_context(urllib.request.urlopen(request, timeout=PATIENCE))

        (sample,) = (each["id"] for each in json.load(ask("config"))["dependencies"] if each["api_name"] == "sample")
        ask("gradio_api/heartbeat/one").readline()
        ask("gradio_api/queue/join", json.dumps(
            {"session_hash": "one", "fn_index": sample, "data": ["emoji16_cd", -1, "0", 8, 16, 1, True]}
        ).encode())  # fmt: skip
        events = ask("gradio_api/queue/data?session_hash=one")
        until(lambda: b"process_starts" in events.readline())
