"""The demo page in Gradio: its layout, its callbacks, and the server."""

import contextlib
import functools
import html
import itertools
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default
from PIL import Image

from cm_jax.demo import rendering
from cm_jax.demo.rendering import CANVAS, EXAMPLES, KINDS, MAX_IMAGES, MAX_STEPS, Picture
from cm_jax.editing.algorithm import EDIT_STEPS
from cm_jax.errors import InputError
from cm_jax.model import Model

_Load = Callable[[str], Model]

_ANY = -1
_EMPTY: Any = None, None, gr.update(value=None, interactive=False), ""
"""Two pictures, a download and a status line, cleared."""
_numbers = itertools.count()
_CSS = """
.pixels img { image-rendering: pixelated; padding-top: 2rem; }
.about { align-content: center; }
footer { display: none !important; }
"""
_INTRODUCTION = "Sample images from a consistency model in one or more steps, and edit pictures without training."
_DEVICES: Any = {"concurrency_id": "devices", "concurrency_limit": 1, "api_visibility": "private"}
_QUICK: Any = {**_DEVICES, "show_progress": "hidden"}
_EDITOR: Any = {"type": "numpy", "format": "png", "sources": (), "transforms": (), "layers": False, "interactive": True}
_THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_LOOK: Any = {"theme": _THEME, "css": _CSS, "footer_links": [], "show_error": True}
_LIMITS: Any = {"max_file_size": 2**25, "state_session_capacity": 256}
_OFF: Any = dict.fromkeys(["share", "ssr_mode", "pwa", "mcp_server", "enable_monitoring", "run_history"], False)


def page(names: Sequence[str], load: _Load) -> gr.Blocks:
    """The page, on which models can be chosen by name; `load` gives that of a name."""
    with gr.Blocks(analytics_enabled=False, title="cm_jax", delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# cm_jax\n{_INTRODUCTION}")
        with gr.Row(equal_height=True):
            name = gr.Dropdown(list(names), label="Model")
            about = gr.Markdown(elem_classes="about")
        labels = _hidden_class(render=False), _hidden_class(render=False)
        example = gr.Radio(list(EXAMPLES), value=next(iter(EXAMPLES)), label="Picture", render=False)
        guidance = gr.Slider(1, 4, 1, step=0.1, label="Guidance", visible=False, render=False)
        shown = [about, *labels, guidance]
        picture = gr.State()  # None again in a session whose state Gradio has dropped
        opened = blocks.load(lambda: rendering.example(next(iter(EXAMPLES)))[0], None, picture, **_QUICK)
        show = _callback(load, show_model), [name, example], shown
        changed = opened.success(*show, **_QUICK), name.change(*show, **_QUICK)
        with gr.Tab("Sample"), gr.Row():
            _sample_tab(load, name, labels[0], guidance)
        with gr.Tab("Edit"), gr.Row():
            _edit_tab(load, name, labels[1], example, picture, changed)
    return blocks


def _sample_tab(load: _Load, name: gr.Dropdown, label: gr.Dropdown, guidance: gr.Slider) -> None:
    with gr.Column(scale=2, min_width=260):
        label.render()
        seeds = gr.Textbox("0", label="Seed", info="Several seeds, such as 3, 8, give an image each.")
        steps = gr.Slider(1, MAX_STEPS, 2, step=1, label="Steps")
        count = gr.Slider(1, MAX_IMAGES, MAX_IMAGES, step=1, label="Number of images")
        guidance.render()
        compare = gr.Checkbox(True, label="Compare one, two and four steps")
        button = gr.Button("Sample", variant="primary")
        status = gr.Markdown(elem_classes="status")
    with gr.Column(scale=3, min_width=300):
        images, file = _image("Samples"), _download("Download the samples")
    with gr.Column(scale=4, min_width=400):
        strip = _image("The same noise in one, two and four steps")
    settings, outputs = [name, label, seeds, steps, count, guidance, compare], [images, strip, file, status]
    button.click(_job(load, sample), settings, outputs, show_progress_on=[images, strip], **_DEVICES)
    name.change(lambda: _EMPTY, None, outputs, **_QUICK)


def _edit_tab(
    load: _Load, name: gr.Dropdown, label: gr.Dropdown, example: gr.Radio, picture: gr.State, model_changed: Any
) -> None:
    with gr.Column(scale=3, min_width=420):
        example.render()
        upload_button = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
        brush = gr.Brush(default_size=32, colors=["#e6007e"], color_mode="fixed")
        size, prompt = (CANVAS, CANVAS), "Paint over the part to inpaint"
        canvas = gr.ImageEditor(label=prompt, brush=brush, canvas_size=size, height=CANVAS + 60, **_EDITOR)
        shown = [canvas, gr.Markdown()]
    with gr.Column(scale=4):
        kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Edit")
        with gr.Row():
            label.render()
            seed = gr.Number(0, label="Seed", precision=0)
        with gr.Row():
            steps = gr.Slider(1, MAX_STEPS, EDIT_STEPS, step=1, label="Steps")
            count = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Number of images")
        button = gr.Button("Edit", variant="primary")
        status = gr.Markdown(elem_classes="status")
        with gr.Row():
            known, edits = _image("Input and known part", buttons=[], min_width=120), _image("Edits", scale=3)
        file = _download("Download the edits")
    results = [known, edits, file, status]
    for event in (*(each.success for each in model_changed), canvas.clear):
        event(_callback(load, show_picture), [name, picture], shown, **_QUICK)
    for change in (upload_button.upload, example.input, name.change):
        change(lambda: _EMPTY, None, results, **_QUICK)
    upload_button.upload(_callback(load, upload), [name, upload_button], [picture, example, *shown], **_QUICK)
    example.input(_callback(load, use_example), [name, example], [picture, label, *shown], **_QUICK)
    settings = [name, kind, picture, canvas, label, seed, steps, count]
    button.click(_job(load, edit), settings, results, show_progress_on=edits, **_DEVICES)


def _hidden_class(**options: Any) -> gr.Dropdown:
    return gr.Dropdown([("any", _ANY)], value=_ANY, label="Class", visible=False, **options)


def _image(label: str, **options: Any) -> gr.Image:
    options = {"buttons": ["download", "fullscreen"], **options}
    return gr.Image(label=label, format="png", interactive=False, elem_classes="pixels", **options)


def _download(label: str) -> gr.DownloadButton:
    return gr.DownloadButton(f"{label} (.zip)", size="sm", interactive=False)


def _callback(load: _Load, function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`function` with the name of a model as its first argument, whose InputError is shown on the page."""

    @functools.wraps(function)
    def call(name: str, *values: Any) -> tuple[Any, ...]:
        try:
            return _numbered(function(load(name), *values))
        except InputError as error:
            raise _shown(error) from error

    return call


def _job(load: _Load, function: Callable[..., Iterator[tuple[Any, ...]]]) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """The same for a function that shows results one after another; after an error no results stay."""

    @functools.wraps(function)
    def call(name: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            for outputs in function(load(name), *values):
                yield _numbered(outputs)
        except Exception as error:
            yield _EMPTY
            raise _shown(error) if isinstance(error, InputError) else error from error

    return call


def _shown(error: InputError) -> gr.Error:
    return gr.Error(html.escape(str(error)), duration=None, print_exception=False)


def _numbered(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pictures with a number: Gradio names files by content, and would overwrite one that a browser is reading."""
    for output in outputs:
        if isinstance(output, Image.Image):
            output.info["number"] = str(next(_numbers))
    return outputs


def _file(name: str, content: bytes) -> Any:
    """A download of this file, in a folder whose name nobody can guess. Gradio deletes the file after an hour."""
    path = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR") or None)) / f"{name}.zip"
    path.write_bytes(content)
    return gr.update(value=str(path), interactive=True)


def show_model(model: Model, example: str | None) -> tuple[Any, ...]:
    """The description, and the choices of class and guidance; edits have the class of the example, if one is shown."""
    choices = rendering.class_choices(model)
    sample_class = gr.Dropdown(choices=[("any", _ANY), *choices], value=_ANY, visible=bool(choices))
    number = dict(choices).get(rendering.example(example)[1], 0) if example else 0
    edit_class = gr.Dropdown(choices=choices, value=number, visible=True) if choices else _hidden_class()
    strengths = rendering.guidance_range(model)
    low, high = strengths or (1, 4)
    guidance = gr.Slider(low, high, max(low, 1), visible=bool(strengths))
    return rendering.describe_model(model), sample_class, edit_class, guidance


def show_picture(model: Model, picture: Picture | None) -> tuple[Any, ...]:
    """The canvas and a line about it; an empty canvas and the reason for a model that the page cannot edit with."""
    picture = _kept(picture)
    try:
        pixels, about = rendering.canvas_image(model, picture)
    except InputError as error:
        return None, str(error)
    return Image.fromarray(pixels), about


def _kept(picture: Picture | None) -> Picture:
    """The picture of a session. Raises InputError if the server no longer has it: after a restart, or long sleep."""
    if picture is None:
        raise InputError("The server no longer has this picture: choose or upload it again.")
    return picture


def upload(model: Model, path: str) -> tuple[Any, ...]:
    picture = rendering.read_picture(Path(path).read_bytes(), Path(path).name)
    return (picture, None, *show_picture(model, picture))


def use_example(model: Model, example: str) -> tuple[Any, ...]:
    picture, class_name = rendering.example(example)
    number = dict(rendering.class_choices(model)).get(class_name, gr.skip())
    return (picture, number, *show_picture(model, picture))


def sample(
    model: Model, label: int, seeds: str, steps: int, count: int, guidance: float, compare: bool
) -> Iterator[tuple[Any, ...]]:
    """The samples, then the strip."""
    request = rendering.read_request(model, seeds, None if label == _ANY else label, count, guidance)
    guided = request.guidance not in (None, 1)
    program, strip = (model, len(request.names), guided, steps), (model, min(4, len(request.names)), guided)
    yield (*_EMPTY[:3], rendering.compiling(*program))
    with rendering.running(*program):
        images, archive, about = rendering.sample_grid(model, request, steps)
    yield images, None, _file("samples", archive), (compare and rendering.compiling(*strip)) or about
    if compare:
        with rendering.running(*strip):
            rows = rendering.steps_strip(model, request)
        yield gr.skip(), rows, gr.skip(), about


def edit(
    model: Model, kind: str, picture: Picture | None, canvas: dict | None, label: int, seed: int, steps: int, count: int
) -> Iterator[tuple[Any, ...]]:
    picture, layers, program = _kept(picture), (canvas or {}).get("layers", ()), (model, kind, steps, count)
    yield (*_EMPTY[:3], rendering.compiling(*program))
    settings = None if label == _ANY else label, seed, steps, count
    with rendering.running(*program):
        known, edits, archive = rendering.edit_grids(model, kind, picture, layers, *settings)
    yield known, edits, _file("edits", archive), ""


def serve(blocks: gr.Blocks, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page on host:port until interrupted; calls `ready` with its address.

    Raises InputError where the server cannot listen.
    """
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"  # Gradio requests its own page once, and nothing else
    host = host.strip("[]")
    shown = f"[{host}]" if ":" in host else host
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()  # uvicorn would log the error itself
        _, address, _ = blocks.launch(
            server_name=shown, server_port=port, prevent_thread_lock=True, quiet=True, **_LOOK, **_LIMITS, **_OFF
        )
    except OSError as error:
        raise InputError(
            f"Cannot listen on {shown}:{port}; use an address of this machine and a free port (--port {port + 1})."
        ) from error
    with contextlib.suppress(KeyboardInterrupt):
        ready(address)
        while blocks.is_running:
            time.sleep(0.1)
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(each, signal.SIG_IGN) for each in stops]  # shutdown takes a few seconds
    blocks.close(verbose=False)  # Gradio's block_thread leaves its queue and the heartbeats of open pages running
    for each, handler in zip(stops, before, strict=True):
        signal.signal(each, handler)
