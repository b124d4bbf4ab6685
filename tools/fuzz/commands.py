"""Command lines: valid ones of every command, with some words changed.

Sampling, evaluation, training and serving are replaced by `Reached`, so a valid line costs little time. Everything
before them runs, such as reading the checkpoint and the data.
"""

import contextlib
import dataclasses
import functools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from cm_jax import cli
from cm_jax.checkpoints import serialization
from cm_jax.cli.convert import Convert
from cm_jax.cli.demo import Demo
from cm_jax.cli.download import Download
from cm_jax.cli.edit import _KINDS
from cm_jax.cli.evaluate import Evaluate
from cm_jax.cli.export import Export
from cm_jax.cli.reconstruct_ema import ReconstructEMA
from cm_jax.cli.sample import Sample
from cm_jax.cli.train import Options
from cm_jax.cli.tune import Tune
from cm_jax.evaluation import FeatureExtractor
from cm_jax.presets import PRESETS

FILES = (
    *("native", "diffusers", "openai.pt", "run", "picture.png", "mask.png", "images.npz"),
    *("statistics.npz", "folder", "jcm"),
)
"""Files of seeds.write in the working folder."""
# fmt: off
VALUES = (
    (  # paths
        "nothing.pt", "picture.png/below", "native", "folder", "run", "run/best", "openai.pt", "picture.png",
        "images.npz", "", ".", "..", "/", "//", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/self/nothing.png",
        "~", "~nobody/x", "~/nothing", "x" * 300, "a/" * 2000 + "b", "emoji16_cd", "cd_imagenet64_l2", "new/deep/x.png",
        "empty", "a\nb.png", "\udcff\udcfe.png", "\x1b[2J.png", "näh.png", "-", "--", "-x", "*.png", "$(touch CANARY)",
        "`touch CANARY`", "fifo", "loop", "dangling", "%s%n", "emoji:held_out", "emoji:x", "tfds:nothing", "tfds:",
        "lpips.safetensors", "native.safetensors",
    ),
    (  # numbers
        "0", "1", "2", "3", "-1", "8", "17", "18", "1e3", "1.5", "nan", "inf", "-inf", "1e39", "1e400", "0x10", "1_000",
        " 1", "٣", "²", "9" * 30, "9" * 5000, "4294967296", "1000000000", "2147483648", "-2147483649", "True", "None",
        "1,2", "",
    ),
    (  # lists
        "8,0", "0,8,17", "80,1.38", "0,1,2", "1,,2", ",", "8;0", "1.5,0", "nan,1", "80,nan", "inf,80", "-1,0",
        "1" + ",1" * 20_000, "king penguin", "a", "all", "ALL", "a,b", "zz", "\u202e", "3", "fid", "fid,kid", "bpd",
        "fid,,", "pr,prdc,is", "3,8", "0,0,8,8", "8,8,0,0", "-1,0,4,4", "0,0,999999999999,4", "1e3,0,0,0",
        "9" * 400 + ",0",
    ),
    (  # words
        "--help", "-h", "--", "-", "---", "--=", "=", "--x=1", "--seed", "--seed=", "--no-check", "--labels",
        "--count=4", "sample", "inpaint", "emoji32-edm", "@file", "\\", "'", '"', ";", "|", "", "\x1b]0;x\x07", "😀",
        "--séed", "--Seed", "--network.base-channels", "--network.nothing", "--objective", "--network", "--..", "--.",
        "--settings", "--options.run",
    ),
)
"""Malformed and unusual values of options."""
# fmt: on

LINES: dict[str, tuple[str, ...]] = {
    "sample": (
        "native",
        "native --count 6 --labels 0,1 --output new.npz",
        "openai.pt --steps 2",
        "run/best --labels a --seed 3",
        "diffusers --timesteps 8,0 --output new",
        "emoji16_cd --count 4 --sigmas 80,1 --sampler consistency",
    ),
    "edit": (
        "inpaint picture.png --checkpoint native --labels 0 --mask mask.png",
        "inpaint picture.png --checkpoint native --labels a --box 2,2,9,9",
        "colorize picture.png --checkpoint native --labels 0 --sigmas 80",
        "superres picture.png --checkpoint native --labels b --patch 2",
        "stroke picture.png mask.png --checkpoint run --labels 0,1 --folder new",
        "denoise picture.png --sigma 0.5 --add --checkpoint native --labels 0",
        "interpolate picture.png mask.png --checkpoint native --labels 0",
        "interpolate --seeds 3,8 --frames 4 --checkpoint native --labels 0",
    ),
    "convert": (
        "native new.pt",
        "openai.pt new --image-size 8 --head-dim 16 --preconditioning consistency --num-levels 18",
        "native new --to diffusers",
        "jcm new --image-size 8 --preconditioning consistency --num-levels 18",
        "diffusers new --num-levels 9",
        "run/best new --check",
    ),
    "train": (
        "emoji32-edm --dry-run",
        "emoji32-sct --dry-run --batch-size 8 --network.base-channels 32",
        "emoji32-ict --dry-run --network.channel-mult 1 2",
        "cifar10-edm --dry-run --data ImageFolder --data.path folder",
        "emoji32-cd --dry-run --teacher native",
        "emoji32-edm --dry-run --data NpzData --data.path images.npz --objective ConsistencyTraining",
    ),
    "evaluate": (
        "images.npz images.npz",
        "folder folder --metrics fid,kid --output new.json",
        "native images.npz --count 4 --steps 2",
        "native images.npz --metrics bpd",
        "images.npz statistics.npz --save-reference new.npz",
    ),
    "tune": ("native images.npz --count 4", "run folder --steps 3 --count 3"),
    "download": ("", "cd_imagenet64_lpips", "edm-cifar10-32x32-uncond-vp --force"),
    "export": ("native new", "run/best new --steps 2 --platforms cpu", "diffusers new --precision bfloat16"),
    "reconstruct-ema": ("run --width 0.07 --output new", "run/best --width 0.03,0.07 --at 2 --output new"),
    "demo": ("native", "native openai.pt --port 8000", "--host 127.0.0.1"),
    "": ("sample native", "edit inpaint picture.png", "--help", "train --help", "sampel"),
}
"""Valid lines of each command."""
_OPTIONS = {
    "sample": (Sample,),
    "edit": tuple(_KINDS.values()),
    "convert": (Convert,),
    "train": (Options,),
    "evaluate": (Evaluate,),
    "tune": (Tune,),
    "download": (Download,),
    "export": (Export,),
    "reconstruct-ema": (ReconstructEMA,),
    "demo": (Demo,),
}


class Reached(BaseException):
    """Raised instead of sampling, training and serving. Nothing catches it, and the input counts as used."""


def line(command: str, rng: random.Random) -> list[str]:
    """Words after the name of the program: a valid line with up to four changes."""
    words = rng.choice(LINES[command]).split()
    options = _options(command, words[0] if words else "")
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 4])):
        value, option, place = rng.choice(rng.choice(VALUES)), rng.choice(options), rng.randrange(len(words) + 1)
        match rng.randrange(12):
            case 0:
                words[place : place + 1] = [value]
            case 1:
                words.insert(place, rng.choice([value, option]))
            case 2:
                del words[place : place + 1]
            case 3:
                rng.shuffle(words)
            case 4 | 5:
                words[place : place + 1] = [_mistyped(word, rng) for word in words[place : place + 1]]
            case _:
                words += rng.choice([[option, value], [option, value], [f"{option}={value}"], [option], [option] * 2])
    name = [command] if command and rng.random() < 0.99 else []
    return [*name, *(word.replace("\0", "") for word in words)]


def _mistyped(word: str, rng: random.Random) -> str:
    cut = rng.randrange(len(word) + 1)
    inserted = word[:cut] + rng.choice("x-=.,é0 ") + word[cut:]
    return rng.choice([word[:cut] + word[cut + 1 :], word[:cut], inserted, word.upper()])


@functools.cache
def _options(command: str, preset: str) -> list[str]:
    """The options of a command; for `train`, also every field of the preset."""

    def fields(component: Any, path: str) -> Iterator[str]:
        entries = component.items() if isinstance(component, dict) else enumerate(component)
        for name, value in entries:
            if name != "kind":
                yield f"{path}{name}"
                yield from fields(value, f"{path}{name}.") if isinstance(value, dict | list) else ()

    names = [field.name for kind in _OPTIONS.get(command, ()) for field in dataclasses.fields(kind)]
    if command == "train" and preset in PRESETS:
        names += fields(serialization.encode(PRESETS[preset]()), "")
    return ["--" + name.replace("_", "-") for name in dict.fromkeys(names)] or ["--help"]


def write_folder(valid: Path, folder: Path) -> None:
    """Valid files, an empty folder, a link to itself and a dangling link."""
    folder.mkdir()
    for name in FILES:
        copy = shutil.copytree if (valid / name).is_dir() else shutil.copyfile
        copy(valid / name, folder / name)
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")


def run(words: Sequence[str]) -> None:
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
        "cm_jax.model": ("generate",),
        "cm_jax.editing.algorithm": ("edit_batches", "slerp_batches"),
        "cm_jax.conversion.parity": ("compare",),
        "urllib.request": ("urlopen",),
        "cm_jax.cli.train": ("dry_run", "train"),
        "cm_jax.cli.evaluate": ("evaluate", "evaluate_bits"),
        "cm_jax.cli.tune": ("tune",),
        "cm_jax.cli.demo": ("_serve",),
        "cm_jax.cli.export": ("write_artifact",),
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
        environment = {"XDG_CACHE_HOME": str(cache), "HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        stack.enter_context(mock.patch.dict("os.environ", environment))
        yield
