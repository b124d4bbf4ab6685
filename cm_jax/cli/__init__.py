"""The command line: `cm-jax sample`, `edit`, `convert`, `train`, `evaluate`, `tune`, `download`, `export`, `demo`.

Most are scripts too. `--import MODULE` imports a module of yours before a command, which registers its components.
"""

import importlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

import cm_jax
from cm_jax.cli.parsing import choose
from cm_jax.cli.running import run, say
from cm_jax.errors import InputError

_COMMANDS = {
    "sample": "Sample images from a consistency model or a denoiser.",
    "edit": "Edit images: inpaint, colorize, super-resolve, stroke, denoise, interpolate.",
    "convert": "Convert checkpoints between PyTorch, diffusers and native JAX formats.",
    "train": "Train a denoiser or a consistency model from a preset.",
    "evaluate": "Evaluate samples or a checkpoint: FID, sFID, KID, IS, precision and recall, bits per dimension.",
    "tune": "Search the noise levels of multistep sampling by FID, and store them in the checkpoint.",
    "reconstruct-ema": "Compute power-function EMAs of other widths from the snapshots of a run.",
    "download": "Download a published checkpoint, or list them.",
    "export": "Export a sampler that runs without this package.",
    "demo": "Sample and edit in the browser.",
}

_EXAMPLES = (
    "cm-jax sample --labels all --steps 2",
    "cm-jax edit colorize photo.png --labels 0",
    "cm-jax convert cd_imagenet64_lpips.pt cd_imagenet64_lpips --check",
    "cm-jax train emoji32-edm",
    "cm-jax evaluate runs/emoji32-cd emoji:held_out --metrics fid,kid --count 431",
    "cm-jax --import my_networks train emoji32-edm --network my-network",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`cm-jax COMMAND [options]`."""

    def dispatch() -> None:
        words = _import_modules(sys.argv[1:] if arguments is None else arguments)
        if words and words[0] == "--version":
            say(f"cm_jax {cm_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}")
            return
        name, _, rest = choose(_COMMANDS, "command", "cm-jax COMMAND [options]", words, _EXAMPLES)
        _call(name, f"cm-jax {name}", rest)

    run(dispatch)


def _import_modules(words: Sequence[str]) -> list[str]:
    """Import the modules that `--import MODULE` names, also from the current folder; returns the other words."""
    rest, given = [], iter(words)
    for word in given:
        flag, equals, name = word.partition("=")
        if flag != "--import":
            rest.append(word)
            continue
        name = name if equals else next(given, "")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name not in (name, name.partition(".")[0]):
                raise  # an import in the module itself
            raise InputError(
                f"--import {name}: there is no such module. Expected the name of a Python module in the current folder "
                "or an installed one, such as my_networks."
            ) from error
    return rest


def _call(name: str, prog: str, words: Sequence[str]) -> None:
    """Run cm_jax/cli/NAME.py, which is imported only now: a command starts without the imports of the others."""
    importlib.import_module(f"cm_jax.cli.{name.replace('-', '_')}").main(prog, words)


def _script(name: str, prog: str) -> Callable[..., NoReturn]:
    """A command as a script of its own."""
    return lambda arguments=None: run(
        lambda: _call(name, prog, _import_modules(sys.argv[1:] if arguments is None else arguments))
    )


main_sample = _script("sample", "sample.py")
main_edit = _script("edit", "edit.py")
main_convert = _script("convert", "python -m convert")
main_train = _script("train", "train.py")
main_evaluate = _script("evaluate", "python -m cm_jax.evaluation")
main_demo = _script("demo", "python -m cm_jax.demo")
