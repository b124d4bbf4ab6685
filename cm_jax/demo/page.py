"""The demo page in Gradio: its layout, its callbacks, and the server."""

import contextlib
import functools
import html
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
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

_Function = Callable[..., tuple[Any, ...]]
_Wrapper = Callable[[_Function], _Function]

_ANY = -1
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
_LIMITS: Any = {"max_file_size": 2**25, "state_session_capacity": 64}
_OFF: Any = dict.fromkeys(["share", "ssr_mode", "pwa", "mcp_server", "enable_monitoring", "run_history"], False)


def page(names: Sequence[str], load: Callable[[str], Model]) -> gr.Blocks:
    """The page, on which models can be chosen by name; `load` gives that of a name."""
    callback = functools.partial(_callback, load)
    with gr.Blocks(analytics_enabled=False, title="cm_jax", delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# cm_jax\n{_INTRODUCTION}")
        with gr.Row(equal_height=True):
            name = gr.Dropdown(list(names), label="Model")
            about = gr.Markdown(elem_classes="about")
        labels = _hidden_class(render=False), _hidden_class(render=False)
        changed = gr.on([blocks.load, name.change], callback(show_model), name, [about, *labels], **_QUICK)
        with gr.Tab("Sample"), gr.Row():
            _sample_tab(callback, name, labels[0])
        with gr.Tab("Edit"), gr.Row():
            _edit_tab(callback, name, labels[1], changed)
    return blocks


def _sample_tab(callback: _Wrapper, name: gr.Dropdown, label: gr.Dropdown) -> None:
    with gr.Column(scale=2, min_width=260):
        label.render()
        seed = gr.Number(0, label="Seed", precision=0)
        steps = gr.Slider(2, MAX_STEPS, 2, step=1, label="Steps")
        count = gr.Slider(1, MAX_IMAGES, MAX_IMAGES, step=1, label="Number of images")
        button = gr.Button("Sample", variant="primary")
    with gr.Column(scale=5):
        with gr.Row():
            one, several = _image("One step"), _image("Several steps from the same noise")
        levels = gr.Markdown()
    settings, outputs = [name, label, seed, steps, count], [one, several, levels]
    button.click(callback(sample), settings, outputs, show_progress_on=several, **_DEVICES)


def _edit_tab(callback: _Wrapper, name: gr.Dropdown, label: gr.Dropdown, model_changed: Any) -> None:
    first, _ = rendering.example(next(iter(EXAMPLES)))
    picture = gr.State(first)
    with gr.Column(scale=3, min_width=420):
        example = gr.Radio(list(EXAMPLES), value=first.name, label="Picture")
        file = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
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
        with gr.Row():
            known, edits = _image("Input and known part", buttons=[], min_width=120), _image("Edits", scale=3)
    model_changed.success(callback(show_picture), [name, picture], shown, **_QUICK)
    canvas.clear(callback(show_picture), [name, picture], shown, **_QUICK)
    file.upload(callback(upload), [name, file], [picture, example, *shown], **_QUICK)
    example.input(callback(use_example), [name, example], [picture, label, *shown], **_QUICK)
    settings = [name, kind, picture, canvas, label, seed, steps, count]
    button.click(callback(edit), settings, [known, edits], show_progress_on=edits, **_DEVICES)


def _hidden_class(**options: Any) -> gr.Dropdown:
    return gr.Dropdown([("any", _ANY)], value=_ANY, label="Class", visible=False, **options)


def _image(label: str, **options: Any) -> gr.Image:
    options = {"buttons": ["download", "fullscreen"], **options}
    return gr.Image(label=label, format="png", interactive=False, elem_classes="pixels", **options)


def _callback(load: Callable[[str], Model], function: _Function) -> _Function:
    """`function` with the name of a model as its first argument, whose InputError is shown on the page."""

    @functools.wraps(function)
    def call(name: str, *values: Any) -> tuple[Any, ...]:
        try:
            outputs = function(load(name), *values)
        except InputError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        for output in outputs:  # Gradio names files by content, and would overwrite one that a browser is reading
            if isinstance(output, Image.Image):
                output.info["number"] = str(next(_numbers))
        return outputs

    return call


def show_model(model: Model) -> tuple[Any, ...]:
    choices = rendering.class_choices(model)
    sample_class = gr.Dropdown(choices=[("any", _ANY), *choices], value=_ANY, visible=bool(choices))
    edit_class = gr.Dropdown(choices=choices, value=0, visible=True) if choices else _hidden_class()
    return rendering.describe_model(model), sample_class, edit_class


def show_picture(model: Model, picture: Picture) -> tuple[Any, ...]:
    pixels, about = rendering.canvas_image(model, picture)
    return Image.fromarray(pixels), about


def upload(model: Model, path: str) -> tuple[Any, ...]:
    picture = rendering.read_picture(Path(path).read_bytes(), Path(path).name)
    return (picture, None, *show_picture(model, picture))


def use_example(model: Model, example: str) -> tuple[Any, ...]:
    picture, class_name = rendering.example(example)
    number = dict(rendering.class_choices(model)).get(class_name, gr.skip())
    return (picture, number, *show_picture(model, picture))


def sample(model: Model, label: int, seed: int, steps: int, count: int) -> tuple[Any, ...]:
    return rendering.sample_grids(model, seed, None if label == _ANY else label, steps, count)


def edit(model: Model, kind: str, picture: Picture, canvas: dict, label: int, *settings: int) -> tuple[Any, ...]:
    return rendering.edit_grids(model, kind, picture, canvas["layers"], None if label == _ANY else label, *settings)


def serve(blocks: gr.Blocks, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page on host:port until interrupted; calls `ready` with its address.

    Raises InputError where the server cannot listen.
    """
    own = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "", "127.0.0.1", "localhost"]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, own))  # Gradio requests its own page once
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()  # uvicorn would log the error itself
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **_LOOK, **_LIMITS, **_OFF
        )
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host}:{port}; use an address of this machine and a free port (--port {port + 1})."
        ) from error
    with contextlib.suppress(KeyboardInterrupt):
        ready(address)
        while blocks.is_running:
            time.sleep(0.1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # shutdown takes a few seconds
    blocks.close(verbose=False)  # Gradio's block_thread leaves its queue and the heartbeats of open pages running
    signal.signal(signal.SIGINT, before)
