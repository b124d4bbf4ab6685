"""The command line: `cm-jax sample`, `edit`, `convert`, `train`, `evaluate`, `tune`, `demo`. Most are scripts too."""

import platform
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

import cm_jax
from cm_jax.cli.parsing import choose, parse
from cm_jax.cli.running import run, say


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`cm-jax COMMAND [options]`."""

    def dispatch() -> None:
        words = sys.argv[1:] if arguments is None else arguments
        if words and words[0] == "--version":
            say(f"cm_jax {cm_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}")
            return
        name, command, rest = choose(_COMMANDS, "command", "cm-jax COMMAND [options]", words, _EXAMPLES)
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
    """Sample images from a consistency model or a denoiser."""
    from cm_jax.cli.sample import Sample, sample

    sample(parse(Sample, prog, arguments))


def _edit(prog: str, arguments: Sequence[str] | None) -> None:
    """Edit images: inpaint, colorize, super-resolve, stroke, denoise, interpolate."""
    from cm_jax.cli.edit import edit

    edit(prog, sys.argv[1:] if arguments is None else arguments)


def _convert(prog: str, arguments: Sequence[str] | None) -> None:
    """Convert checkpoints between PyTorch, diffusers and native JAX formats."""
    from cm_jax.cli.convert import Convert, convert

    convert(parse(Convert, prog, arguments))


def _train(prog: str, arguments: Sequence[str] | None) -> None:
    """Train a denoiser or a consistency model from a preset."""
    from cm_jax.cli.train import train

    train(prog, sys.argv[1:] if arguments is None else arguments)


def _evaluate(prog: str, arguments: Sequence[str] | None) -> None:
    """Evaluate samples or a checkpoint: FID, sFID, KID, IS, precision and recall, bits per dimension."""
    from cm_jax.cli.evaluate import Evaluate, evaluate_command

    evaluate_command(parse(Evaluate, prog, arguments))


def _tune(prog: str, arguments: Sequence[str] | None) -> None:
    """Search the noise levels of multistep sampling by FID, and store them in the checkpoint."""
    from cm_jax.cli.tune import Tune, tune_command

    tune_command(parse(Tune, prog, arguments))


def _demo(prog: str, arguments: Sequence[str] | None) -> None:
    """Sample and edit in the browser."""
    from cm_jax.cli.demo import Demo, demo

    demo(parse(Demo, prog, arguments))


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
    "cm-jax edit colorize photo.png --labels 0",
    "cm-jax convert cd_imagenet64_lpips.pt cd_imagenet64_lpips --check",
    "cm-jax train emoji32-edm",
    "cm-jax evaluate runs/emoji32-cd emoji:held_out --metrics fid,kid --count 431",
)
