"""`demo`: sampling and editing on a web page."""

import contextlib
import dataclasses
import functools
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cm_jax.checkpoints.published import BUNDLED, resolve
from cm_jax.cli.options import Compilation, WhichWeights
from cm_jax.cli.parsing import parse
from cm_jax.cli.running import say, use_compilation_cache
from cm_jax.errors import InputError, check_int
from cm_jax.progress import activity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(WhichWeights, Compilation):
    """Sample and edit in the browser.

    The page is served locally and loads nothing from the internet. Ctrl-C stops the server.
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")] = ()
    """Models to offer, as for `sample`; each is loaded on first use. Default: the bundled models."""
    port: int = 7860
    """Port of the server."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 admits other machines: anyone who can reach the port can use the page."""


def main(prog: str, words: Sequence[str]) -> None:
    """Serve the page until interrupted."""
    args = parse(Demo, prog, words)
    check_int("--port", args.port, 1, 2**16 - 1)
    if (args.key or args.ema) and not args.checkpoints:
        raise InputError("--key and --ema apply to checkpoints: name some, or leave the options out.")
    checkpoints = {name: resolve(name) for name in args.checkpoints or BUNDLED}
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(each, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="cm_jax-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and images are removed with it
        _serve(checkpoints, args)
    if threading.active_count() > 1:
        os._exit(0)  # a thread is still sampling: ending it inside XLA would abort the process


def _serve(checkpoints: dict[str, Path], args: Demo) -> None:
    with contextlib.ExitStack() as starting:
        starting.enter_context(activity("Starting the page"))
        try:
            from cm_jax.demo.page import page, serve
        except ImportError as error:
            problem = f"The demo needs Gradio, and {error.name} is not installed"
            raise InputError(f"{problem}: pip install gradio.") from error

        def ready(address: str) -> None:
            starting.close()
            say(f"The page is at {address}")

        use_compilation_cache(args.compilation_cache)
        load = functools.cache(lambda name: args.load(checkpoints[name], name=name))
        serve(page(list(checkpoints), load), args.host, args.port, ready)
