"""The command line: `cm-jax sample`, `edit`, `convert`, `train`, `evaluate`, `tune`, `demo`; most also as scripts."""

import platform
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

import cm_jax
from cm_jax.cli.parsing import chosen, parsed
from cm_jax.cli.running import run, say


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`cm-jax COMMAND [options]`: any of the above."""

    def dispatch() -> None:
        words = sys.argv[1:] if arguments is None else arguments
        if words and words[0] == "--version":
            say(f"cm_jax {cm_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}")
            return
        name, command, rest = chosen(_COMMANDS, "command", "cm-jax COMMAND [options]", words, _EXAMPLES)
        command(f"cm-jax {name}", rest)

    run(dispatch)


def main_sample(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python sample.py ...`."""
    run(lambda: _sample("sample.py", arguments))


def main_edit(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python edit.py ...`."""
    run(lambda: _edit("edit.py", arguments))


def main_convert(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python -m convert ...`."""
    run(lambda: _convert("python -m convert", arguments))


def main_train(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python train.py ...`."""
    run(lambda: _train("train.py", arguments))


def main_evaluate(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python -m cm_jax.evaluation ...`."""
    run(lambda: _evaluate("python -m cm_jax.evaluation", arguments))


def main_demo(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python -m cm_jax.demo ...`."""
    run(lambda: _demo("python -m cm_jax.demo", arguments))


def _sample(prog: str, arguments: Sequence[str] | None) -> None:
    """Draw images from a consistency model, or from an EDM teacher."""
    from cm_jax.cli.sample import Sample, sample

    sample(parsed(Sample, prog, arguments))


def _edit(prog: str, arguments: Sequence[str] | None) -> None:
    """Inpaint, colour, sharpen, repaint, denoise and blend pictures, with no training."""
    from cm_jax.cli.edit import edit

    edit(prog, sys.argv[1:] if arguments is None else arguments)


def _convert(prog: str, arguments: Sequence[str] | None) -> None:
    """Convert a checkpoint between PyTorch and JAX, in every direction."""
    from cm_jax.cli.convert import Convert, convert

    convert(parsed(Convert, prog, arguments))


def _train(prog: str, arguments: Sequence[str] | None) -> None:
    """Train a denoiser or a consistency model by a preset, on the bundled emoji or on your images."""
    from cm_jax.cli.train import train

    train(prog, sys.argv[1:] if arguments is None else arguments)


def _evaluate(prog: str, arguments: Sequence[str] | None) -> None:
    """Judge samples, or what a checkpoint draws: FID, KID, precision and recall, bits per dimension."""
    from cm_jax.cli.evaluate import Evaluate, evaluate_command

    evaluate_command(parsed(Evaluate, prog, arguments))


def _tune(prog: str, arguments: Sequence[str] | None) -> None:
    """Search the levels of a consistency model for several steps, and keep them in its checkpoint."""
    from cm_jax.cli.tune import Tune, tune_command

    tune_command(parsed(Tune, prog, arguments))


def _demo(prog: str, arguments: Sequence[str] | None) -> None:
    """Draw and edit on a page in the browser."""
    from cm_jax.cli.demo import Demo, demo

    demo(parsed(Demo, prog, arguments))


_COMMANDS: dict[str, Callable[[str, Sequence[str] | None], None]] = {
    "sample": _sample,
    "edit": _edit,
    "convert": _convert,
    "train": _train,
    "evaluate": _evaluate,
    "tune": _tune,
    "demo": _demo,
}

_EXAMPLES = (
    "cm-jax sample --labels all --steps 2",
    "cm-jax edit colourise photo.png --labels 0",
    "cm-jax convert cd_imagenet64_lpips.pt cd_imagenet64_lpips --check",
    "cm-jax train emoji32-edm",
    "cm-jax evaluate runs/emoji32-cd emoji:held_out --metrics fid,kid --count 431",
)
