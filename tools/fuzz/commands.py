"""Command lines: valid ones of every command, with some words mutated.

Sampling, evaluation, training and serving are replaced by `Reached`, so a valid line costs little time. Everything
before them runs, such as reading the checkpoint and the data.
"""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from cm_jax import cli
from cm_jax.checkpoints import serialization
from cm_jax.cli.convert import Convert
from cm_jax.cli.demo import Demo
from cm_jax.cli.edit import _KINDS
from cm_jax.cli.evaluate import Evaluate
from cm_jax.cli.sample import Sample
from cm_jax.cli.train import Options
from cm_jax.cli.tune import Tune
from cm_jax.evaluation import FeatureExtractor
from cm_jax.presets import PRESETS
from tools.fuzz.outcomes import Reached
from tools.fuzz.values import malformed_value

FILES = (
    *("native", "diffusers", "openai.pt", "run", "picture.png", "mask.png", "images.npz"),
    *("statistics.npz", "folder", "jcm"),
)
"""Files of seeds.write to copy into the working folder."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, valid lines and its options."""

    name: str
    lines: tuple[str, ...]
    options: Callable[[str], Sequence[str]]
    """Options that fit the given line."""

    def line(self, rng: random.Random) -> list[str]:
        """Words after the name of the program: a valid line with up to four mutations."""
        good = rng.choice(self.lines)
        words, options = good.split(), list(self.options(good))
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 4])):
            words = rng.choice(_MUTATIONS)(words, options, rng)
        first = [] if rng.random() < 0.01 else [self.name]
        return [*first, *(word.replace("\0", "") for word in words)]


Words = list[str]


def _given(words: Words, options: Sequence[str], rng: random.Random) -> Words:
    option = rng.choice(options)
    value = malformed_value(rng)
    return [*words, *rng.choice([[option, value], [option, value], [f"{option}={value}"], [option], [option] * 2])]


def _changed(words: Words, options: Sequence[str], rng: random.Random) -> Words:
    place = rng.randrange(len(words) + 1)
    return [*words[:place], malformed_value(rng), *words[place + 1 :]]


def _inserted(words: Words, options: Sequence[str], rng: random.Random) -> Words:
    place = rng.randrange(len(words) + 1)
    return [*words[:place], rng.choice([malformed_value(rng), rng.choice(options)]), *words[place:]]


def _removed(words: Words, options: Sequence[str], rng: random.Random) -> Words:
    place = rng.randrange(len(words) + 1)
    return words[:place] + words[place + 1 :]


def _mistyped(words: Words, options: Sequence[str], rng: random.Random) -> Words:
    if not words:
        return words
    place = rng.randrange(len(words))
    word = words[place]
    cut = rng.randrange(len(word) + 1)
    other = rng.choice(
        [word[:cut] + word[cut + 1 :], word[:cut], word[:cut] + rng.choice("x-=.,é0 ") + word[cut:], word.upper()]
    )
    return [*words[:place], other, *words[place + 1 :]]


def _shuffled(words: Words, options: Sequence[str], rng: random.Random) -> Words:
    return rng.sample(words, len(words))


_MUTATIONS = (*(_given,) * 6, _changed, _changed, _inserted, _removed, _mistyped, _mistyped, _shuffled)


def _fields(*kinds: type) -> tuple[str, ...]:
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    return tuple("--" + name.replace("_", "-") for name in dict.fromkeys(fields))


@functools.cache
def _training_options(line: str) -> tuple[str, ...]:
    """The options of `train`, and every field of the preset that the line names."""

    def paths(component: Any, path: str) -> Iterator[str]:
        entries = enumerate(component) if isinstance(component, list) else ()
        if isinstance(component, dict):
            entries = component.items()
        for name, value in entries:
            here = f"{path}.{name}" if path else str(name)
            if name != "kind":
                yield "--" + here.replace("_", "-")
                yield from paths(value, here)

    preset = PRESETS.get(line.split()[0])
    return (*_fields(Options), *(paths(serialization.encode(preset()), "") if preset else ()))


def _of(*kinds: type) -> Callable[[str], Sequence[str]]:
    options = _fields(*kinds)
    return lambda line: options


COMMANDS: tuple[Command, ...] = (
    Command(
        "sample",
        (
            "native",
            "native --count 6 --labels 0,1 --output new.npz",
            "openai.pt --steps 2",
            "run/best --labels a --seed 3",
            "diffusers --timesteps 8,0 --output new",
            "emoji16_cd --count 4 --sigmas 80,1 --sampler consistency",
        ),
        _of(Sample),
    ),
    Command(
        "edit",
        (
            "inpaint picture.png --checkpoint native --labels 0 --mask mask.png",
            "inpaint picture.png --checkpoint native --labels a --box 2,2,9,9",
            "colorize picture.png --checkpoint native --labels 0 --sigmas 80",
            "superres picture.png --checkpoint native --labels b --patch 2",
            "stroke picture.png mask.png --checkpoint run --labels 0,1 --folder new",
            "denoise picture.png --sigma 0.5 --add --checkpoint native --labels 0",
            "interpolate picture.png mask.png --checkpoint native --labels 0",
            "interpolate --seeds 3,8 --frames 4 --checkpoint native --labels 0",
        ),
        _of(*_KINDS.values()),
    ),
    Command(
        "convert",
        (
            "native new.pt",
            "openai.pt new --image-size 8 --head-dim 16 --preconditioning consistency --num-levels 18",
            "native new --to diffusers",
            "jcm new --image-size 8 --preconditioning consistency --num-levels 18",
            "diffusers new --num-levels 9",
            "run/best new --check",
        ),
        _of(Convert),
    ),
    Command(
        "train",
        (
            "emoji32-edm --dry-run",
            "emoji32-sct --dry-run --batch-size 8 --network.base-channels 32",
            "emoji32-ict --dry-run --network.channel-mult 1 2",
            "cifar10-edm --dry-run --data ImageFolder --data.path folder",
            "emoji32-cd --dry-run --teacher native",
            "emoji32-edm --dry-run --data NpzData --data.path images.npz --objective ConsistencyTraining",
        ),
        _training_options,
    ),
    Command(
        "evaluate",
        (
            "images.npz images.npz",
            "folder folder --metrics fid,kid --output new.json",
            "native images.npz --count 4 --steps 2",
            "native images.npz --metrics bpd",
            "images.npz statistics.npz --save-reference new.npz",
        ),
        _of(Evaluate),
    ),
    Command("tune", ("native images.npz --count 4", "run folder --steps 3 --count 3"), _of(Tune)),
    Command("demo", ("native", "native openai.pt --port 8000", "--host 127.0.0.1"), _of(Demo)),
    Command(
        "", ("sample native", "edit inpaint picture.png", "--help", "train --help", "sampel"), lambda line: ("--help",)
    ),
)


def add_special_files(folder: Path) -> None:
    """Add an empty folder, a link to itself and a dangling link."""
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")


def run_command(words: Sequence[str]) -> None:
    """Run `cm-jax words` up to the point where the work would start."""
    cli.main(words)


@contextlib.contextmanager
def without_work(cache: Path) -> Iterator[None]:
    """Raise `Reached` where work would start, and keep all caches in `cache`."""

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    def extractor(weights: str = "") -> FeatureExtractor:
        from cm_jax.evaluation.features import load_inception

        return load_inception(weights) if weights else FeatureExtractor(reached, {"x": np.zeros(1)}, "a toy", "none")

    def keep(folder: str) -> None:
        """use_compilation_cache without changes to the settings of this process."""
        with mock.patch("jax.config.update"):
            real(folder if folder in ("", "off") else str(cache / "named"))

    from cm_jax.cli.running import use_compilation_cache as real

    places = {
        "cm_jax.model": ("generate", "edit_batches", "slerp_batches"),
        "cm_jax.conversion.parity": ("compare",),
        "cm_jax.cli.train": ("report", "train"),
        "cm_jax.cli.evaluate": ("evaluate", "evaluate_bits"),
        "cm_jax.cli.tune": ("tune",),
        "cm_jax.cli.demo": ("_serve",),
        "jax.distributed": ("initialize",),
    }
    with contextlib.ExitStack() as stack:
        for module, names in places.items():
            for name in names:
                stack.enter_context(mock.patch(f"{module}.{name}", reached))
        for command in ("evaluate", "tune"):
            stack.enter_context(mock.patch(f"cm_jax.cli.{command}.load_inception", extractor))
        for command in ("sample", "edit", "train", "evaluate", "tune", "demo"):
            stack.enter_context(mock.patch(f"cm_jax.cli.{command}.use_compilation_cache", keep))
        stack.enter_context(mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(cache), "HOME": str(cache)}))
        yield
