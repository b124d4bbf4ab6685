"""The page around `drawing`, in Gradio: what can be chosen, and where the pictures stand."""

import contextlib
import functools
import html
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from gradio.themes import Default
from PIL import Image

from cm_jax.demo import rendering
from cm_jax.demo.rendering import EXAMPLES, KINDS, MOST_IMAGES, MOST_STEPS, Picture
from cm_jax.editing import EDIT_STEPS
from cm_jax.errors import InputError
from cm_jax.model import Model

P = ParamSpec("P")
T = TypeVar("T")

_ANY = -1
_numbers = itertools.count()
_MOST_UPLOAD = 2**25
_SESSIONS = 64
_CSS = """
.pixels img { image-rendering: pixelated; padding-top: 2rem; }
.about { align-content: center; }
footer { display: none !important; }
"""
_WELCOME = """# cm_jax
Draw with a consistency model, in one step and in several, and edit pictures with no training."""


def page(checkpoints: Mapping[str, Path]) -> gr.Blocks:
    """The page, on which the models of these paths can be chosen by name."""

    def model(name: str) -> Model:
        return rendering.loaded(checkpoints[name])

    @_in_words
    def show_model(name: str) -> tuple[str, gr.Dropdown, gr.Dropdown]:
        choices = rendering.class_choices(model(name))
        of_images = gr.Dropdown(choices=[("any", _ANY), *choices], value=_ANY, visible=bool(choices))
        of_picture = gr.Dropdown(choices=choices, value=0, visible=True) if choices else _no_class()
        return rendering.described(model(name)), of_images, of_picture

    @_in_words
    def show_picture(name: str, picture: Picture) -> tuple[Any, str]:
        pixels, told = rendering.as_seen(model(name), picture)
        return _apart(Image.fromarray(pixels)), told

    @_in_words
    def draw(name: str, label: int, seed: int, steps: int, count: int) -> tuple[Any, Any, str]:
        one, many, told = rendering.one_beside_many(model(name), seed, None if label == _ANY else label, steps, count)
        return _apart(one), _apart(many), told

    @_in_words
    def take_upload(name: str, path: str) -> tuple[Any, ...]:
        picture = rendering.read(Path(path).read_bytes(), Path(path).name)
        return (picture, None, *show_picture(name, picture))

    @_in_words
    def take_example(name: str, example: str) -> tuple[Any, ...]:
        picture, class_name = rendering.example(example)
        number = dict(rendering.class_choices(model(name))).get(class_name)
        return (picture, gr.skip() if number is None else number, *show_picture(name, picture))

    @_in_words
    def edit(
        name: str, kind: str, picture: Picture, canvas: dict[str, Any], label: int, seed: int, steps: int, count: int
    ) -> tuple[Any, Any]:
        chosen = None if label == _ANY else label
        known, edited = rendering.edits(model(name), kind, picture, canvas["layers"], seed, chosen, steps, count)
        return _apart(known), _apart(edited)

    first, _ = rendering.example(next(iter(EXAMPLES)))
    with gr.Blocks(analytics_enabled=False, title="cm_jax", delete_cache=(600, 3600)) as blocks:
        picture = gr.State(first)
        gr.Markdown(_WELCOME)
        with gr.Row(equal_height=True):
            name = gr.Dropdown(list(checkpoints), label="Model")
            about = gr.Markdown(elem_classes="about")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2, min_width=260):
                of_images, seed = _no_class(), _seed()
                steps = gr.Slider(2, MOST_STEPS, 2, step=1, label="Steps, beside one")
                count = gr.Slider(1, MOST_IMAGES, MOST_IMAGES, step=1, label="Images")
                begin = gr.Button("Draw", variant="primary")
            with gr.Column(scale=5):
                with gr.Row():
                    one, many = _shown("In one step"), _shown("In several steps, from the same noise")
                levels = gr.Markdown()
        with gr.Tab("Edit"), gr.Row():
            with gr.Column(scale=3, min_width=420):
                example = gr.Radio(list(EXAMPLES), value=first.name, label="Picture")
                upload = gr.UploadButton("Upload a picture", file_types=["image"], size="sm")
                canvas = gr.ImageEditor(
                    label="Paint over what is to be made anew",
                    type="numpy",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=32, colors=["#e6007e"], color_mode="fixed"),
                    canvas_size=(rendering.PAINTED, rendering.PAINTED),
                    height=rendering.PAINTED + 60,
                    interactive=True,
                )
                seen = gr.Markdown()
            with gr.Column(scale=4):
                kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Edit")
                with gr.Row():
                    of_picture, edit_seed = _no_class(), _seed()
                with gr.Row():
                    edit_steps = gr.Slider(1, MOST_STEPS, EDIT_STEPS, step=1, label="Steps")
                    variants = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Edits")
                begin_edit = gr.Button("Edit", variant="primary")
                with gr.Row():
                    known, edited = _shown("Given, and known", buttons=[], min_width=120), _shown("Edits", scale=3)

        alone: Any = {"concurrency_id": "devices", "concurrency_limit": 1, "api_visibility": "private"}
        quick: Any = {**alone, "show_progress": "hidden"}
        seen_now = [canvas, seen]
        changed = gr.on([blocks.load, name.change], show_model, name, [about, of_images, of_picture], **quick)
        changed.success(show_picture, [name, picture], seen_now, **quick)
        canvas.clear(show_picture, [name, picture], seen_now, **quick)
        upload.upload(take_upload, [name, upload], [picture, example, *seen_now], **quick)
        example.input(take_example, [name, example], [picture, of_picture, *seen_now], **quick)
        begin.click(draw, [name, of_images, seed, steps, count], [one, many, levels], show_progress_on=many, **alone)
        painted = [name, kind, picture, canvas, of_picture, edit_seed, edit_steps, variants]
        begin_edit.click(edit, painted, [known, edited], show_progress_on=edited, **alone)
    return blocks


def serve(blocks: gr.Blocks, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Answer on host:port until interrupted, and tell `ready` the page's address.

    Raises InputError where nothing can listen.
    """
    own = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "", "127.0.0.1", "localhost"]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, own))  # Gradio calls its own page once
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()  # uvicorn would log the reason for itself
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=_MOST_UPLOAD,
            state_session_capacity=_SESSIONS,
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_CSS,
        )
    except OSError as error:
        raise InputError(
            f"Nothing can listen on {host}:{port}: give an address of this machine and a free port (--port {port + 1})."
        ) from error
    with contextlib.suppress(KeyboardInterrupt):
        ready(address)
        while blocks.is_running:
            time.sleep(0.1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest takes some seconds at most
    blocks.close(verbose=False)  # Gradio's own block_thread leaves its queue and the open pages' heartbeats running
    signal.signal(signal.SIGINT, before)


def _in_words(function: Callable[P, T]) -> Callable[P, T]:
    """Complaints as a message on the page."""

    @functools.wraps(function)
    def answered(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    return answered


def _apart(picture: Image.Image) -> Image.Image:
    """In a file of its own: Gradio names them by content, and writes over one that a browser may be reading."""
    picture.info["number"] = str(next(_numbers))
    return picture


def _no_class() -> gr.Dropdown:
    return gr.Dropdown([("any", _ANY)], value=_ANY, label="Class", visible=False)


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0)


def _shown(label: str, **options: Any) -> gr.Image:
    options = {"buttons": ["download", "fullscreen"], **options}
    return gr.Image(label=label, format="png", interactive=False, elem_classes="pixels", **options)
