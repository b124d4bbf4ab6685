"""`demo`: a page in the browser, to draw and to edit with."""

import dataclasses
import os
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import tyro

from cm_jax.checkpoints.published import BUNDLED
from cm_jax.checkpoints.resolve import resolve
from cm_jax.cli.running import say, use_compilation_cache
from cm_jax.errors import InputError, check_int


@dataclasses.dataclass(frozen=True)
class Demo:
    """A page in the browser: draw in one step and in several, paint on a picture what is to be made anew.

    It is served by this machine to this machine, and fetches nothing from anywhere. Ctrl-C ends it.
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")] = ()
    """Models to choose from, as `sample` takes them, each read when it is first chosen. Default: the bundled ones."""
    port: int = 7860
    """Where the page is: http://127.0.0.1:PORT."""
    host: str = "127.0.0.1"
    """The address to listen on. 0.0.0.0 lets other machines in: whoever reaches the port can use the page."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""


def demo(arguments: Demo) -> None:
    """Serve the page until interrupted."""
    check_int("--port", arguments.port, 1, 2**16 - 1)
    names = arguments.checkpoints or tuple(BUNDLED)
    checkpoints = {name: resolve(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="cm_jax-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and pictures go there, and go with the page
        _serve(checkpoints, arguments)
    if threading.active_count() > 1:
        os._exit(0)  # something is being drawn: where Python ends a thread within XLA's code, the process aborts


def _serve(checkpoints: dict[str, Path], arguments: Demo) -> None:
    try:
        from cm_jax.demo.page import page, serve
    except ImportError as error:
        raise InputError(f"The page needs Gradio, and {error.name} is not installed: pip install gradio.") from error
    use_compilation_cache(arguments.compilation_cache)
    serve(page(checkpoints), arguments.host, arguments.port, lambda address: say(f"The page is at {address}"))
