"""The readers of others' files and of our own, and how the files of each are damaged."""

import dataclasses
import functools
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm_jax.checkpoints import serialization
from cm_jax.conversion import CheckpointHints, metric_networks, read
from cm_jax.conversion.pickles import read_arrays, read_torch
from cm_jax.data import ImageFolder, NpzData
from cm_jax.editing import photos
from cm_jax.errors import InputError
from cm_jax.evaluation import references
from cm_jax.evaluation.image_sets import open_images
from cm_jax.feature_networks import lpips
from cm_jax.model import find
from cm_jax.presets import PRESETS
from cm_jax.training import loop
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, METRICS, Log, read_metrics
from cm_jax.training.run.provenance import record_start
from tools.fuzz import payloads, seeds
from tools.fuzz.damage import damaged, json_damaged, npy_damaged, safetensors_damaged, zip_damaged

TOLD = CheckpointHints(head_dim=16, preconditioning="consistency", levels=18, image_size=8)
_JCM_TOLD = CheckpointHints(preconditioning="consistency", levels=18, image_size=8)


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader: what it reads, how that is damaged, and what it may write."""

    name: str
    use: Callable[[Path, random.Random], Any]
    """Given the working folder, in which the good files of `files` lie and the damaged ones among them."""
    files: tuple[str, ...]
    """Files or folders of seeds.write that it is given."""
    injure: Callable[[Path, random.Random], None]
    may_write: Callable[[str, str], bool] = lambda name, outcome: False
    """Given the name of a file, and whether the input was used or refused."""

    def prepare(self, seed: Path, folder: Path, dice: random.Random) -> None:
        """Copy the good files into an empty folder, and damage them."""
        for name in self.files:
            copy = shutil.copytree if (seed / name).is_dir() else shutil.copyfile
            copy(seed / name, folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile does not like two entries of one name
            self.injure(folder, dice)


def rewritten(name: str, *ways: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    """A damage of the file `name`, in one of these ways."""

    def injure(folder: Path, dice: random.Random) -> None:
        file = folder / name
        file.write_bytes(dice.choice(ways)(file.read_bytes(), dice))

    return injure


def one_of(*injuries: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, dice: dice.choice(injuries)(folder, dice)


def anywhere(top: str) -> Callable[[Path, random.Random], None]:
    """In a folder: a file damaged by what suits its name, or missing, or a folder instead, or another's content."""

    def injure(folder: Path, dice: random.Random) -> None:
        files = sorted(path for path in (folder / top).rglob("*") if path.is_file())
        file = dice.choice(files)
        what = dice.randrange(12)
        if what == 0:
            file.unlink()
        elif what == 1:
            file.unlink()
            file.mkdir()
        elif what == 2:
            shutil.copyfile(dice.choice(files), folder / "copied")
            (folder / "copied").replace(file)
        elif what == 3:
            shutil.rmtree(file.parent)
        else:
            kinds = {".json": json_damaged, ".safetensors": safetensors_damaged, ".npz": _npz}
            file.write_bytes(kinds.get(file.suffix, damaged)(file.read_bytes(), dice))

    return injure


@functools.cache
def _pickles() -> list[bytes]:
    return payloads.pickles()


@functools.cache
def _bomb() -> bytes:
    return payloads.bomb("archive", 2**28)


def _injected(content: bytes, dice: random.Random) -> bytes:
    return payloads.injected(content, dice, _pickles())


def _poisoned(content: bytes, dice: random.Random) -> bytes:
    """A zip archive whose pickle would run code."""
    way = dice.choice([_injected, _injected, damaged])
    return zip_damaged(
        content, dice, lambda data, dice: way(data, dice) if data[:1] == b"\x80" else damaged(data, dice)
    )


def _legacy(content: bytes, dice: random.Random) -> bytes:
    """A payload in the place of one of the five pickles at the beginning."""
    end = content.index(b".", dice.choice([0, 30, 40, 60, 200])) + 1
    return content[:end] + dice.choice(_pickles()) + content[end:] if dice.random() < 0.5 else _injected(content, dice)


def _bombs(content: bytes, dice: random.Random) -> bytes:
    return _bomb() if dice.random() < 0.05 else damaged(content, dice)


def _npz(content: bytes, dice: random.Random) -> bytes:
    def member(data: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.2:  # an array of objects is a header and a pickle
            head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + dice.choice(_pickles())
        return npy_damaged(data, dice)

    return zip_damaged(content, dice, member)


def _png(content: bytes, dice: random.Random) -> bytes:
    """A PNG whose header claims another size, depth or kind, with a checksum that fits."""
    sizes = [0, 1, 7, 20, 8000, 8192, 2**16, 2**24, 2**31 - 1, 2**32 - 1]
    told = struct.pack(
        ">IIBBBBB",
        dice.choice(sizes),
        dice.choice(sizes),
        *(dice.choice([0, 1, 2, 3, 4, 8, 16, 255]) for _ in range(5)),
    )
    told = told[:8] + dice.choice([bytes([8, 2, 0, 0, 0]), told[8:]])
    return content[:12] + b"IHDR" + told + struct.pack(">I", zlib.crc32(b"IHDR" + told)) + content[33:]


def _csv(content: bytes, dice: random.Random) -> bytes:
    lines = content.decode().splitlines()
    place = dice.randrange(len(lines))
    cells = lines[place].split(",")
    cells[dice.randrange(len(cells))] = dice.choice(
        ["", "nan", "-1", "1e999", "x", '"', "9" * 5000, "=cmd()", "\0", "\x1b[2J", "5.5", "batches", "٣", "1_0"]
    )
    lines[place] = ",".join(cells)
    return ("\n".join(lines) + dice.choice(["", "\n", "\r", "\n\n"])).encode()


def _all_numbers(tensors: Any) -> None:
    for tensor in tensors.values():
        tensor.read()


def _told(dice: random.Random, told: CheckpointHints) -> CheckpointHints:
    """What the user says: enough, or nothing."""
    return told if dice.random() < 0.8 else CheckpointHints()


def _converted(folder: Path, dice: random.Random) -> None:
    read(
        folder / next(name for name in ("openai.pt", "legacy.pt", "jcm") if (folder / name).exists()), _told(dice, TOLD)
    )


def _jcm(folder: Path, dice: random.Random) -> None:
    read(folder / "jcm", _told(dice, _JCM_TOLD))


def _run(folder: Path, dice: random.Random) -> None:
    """All that goes on with a run or draws from it does."""
    run = folder / "run"
    ways: list[Callable[[], Any]] = [
        lambda: read(find(run)),
        lambda: read(find(run / "best")),
        lambda: read_metrics(run / METRICS),
        lambda: read_metrics(run / EVALUATIONS),
        lambda: record_start(run, 10, ["train.py"]),
        lambda: loop._agree(run, PRESETS["emoji32-edm"]()),
        lambda: _resumed(run),
        lambda: Log(run, 5).close(),
    ]
    failures = []
    for way in ways:
        try:
            way()
        except InputError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _resumed(run: Path) -> None:
    with RunFolder(run) as opened:
        opened.best()
        opened.resume(seeds.STATE)


def _of_a_run(name: str, outcome: str) -> bool:
    """What a run that goes on writes: its records, cut back to where it goes on, and the lock. Never a checkpoint."""
    records = (
        "run/run.json",
        "run/config.json",
        "run/.lock",
        "run/metrics.csv",
        "run/evaluations.csv",
        "run/tensorboard",
    )
    return name.startswith(records) or name in ("run", "run/checkpoints")


def _state(folder: Path, dice: random.Random) -> None:
    _resumed(folder / "run")


def _settings(folder: Path, dice: random.Random) -> None:
    file = folder / "training.json"
    serialization.from_text(
        file.read_text("utf-8", "replace"), TrainConfig, loop.FORMAT, str(file), "the config of a run"
    )


def _statistics(folder: Path, dice: random.Random) -> None:
    references.open_reference(str(folder / "statistics.npz"), ("pool", "spatial"), (8, 8, 3))


def _arrays_of_images(folder: Path, dice: random.Random) -> None:
    file = str(folder / "images.npz")
    if dice.random() < 0.3:
        open_images(file)
    else:
        NpzData(file).open(dice.choice([4, 8, 16]))


def _pictured(folder: Path, dice: random.Random) -> None:
    (file,) = folder.iterdir()
    picture = photos.read(file)
    photos.back(picture, np.zeros((8, 8, 3), np.uint8) + (photos.fitted(picture, 8) > 2).astype(np.uint8))


def _mask(folder: Path, dice: random.Random) -> None:
    photos.fitted_hole(photos.hole_of(photos.read(folder / "mask.png"), 20, 24), 8)


def _image_folder(folder: Path, dice: random.Random) -> None:
    ImageFolder(str(folder / "folder"), labels=dice.choice(["auto", "none", "folder"])).open(8)


def _picture(name: str) -> Target:
    ways = (damaged, damaged, _png) if name.endswith(".png") else (damaged,)
    return Target(f"picture, {name}", _pictured, (name,), rewritten(name, *ways))


def _weights(folder: Path, dice: random.Random) -> None:
    lpips.FILE.load(str(folder / "weights.safetensors"), seeds.WEIGHTS)


def _inception(folder: Path, dice: random.Random) -> None:
    _all_numbers(read_torch(folder / "inception.pt"))
    metric_networks.read_inception(folder / "inception.pt")


def _lpips(folder: Path, dice: random.Random) -> None:
    _all_numbers(read_arrays(folder / "arrays.ckpt"))
    metric_networks.read_lpips(folder / "arrays.ckpt")


def _config(folder: Path, dice: random.Random) -> None:
    jax.tree.leaves(read(folder / "ours", TOLD if dice.random() < 0.1 else CheckpointHints()).params)


PICTURES = (
    "picture.png",
    "picture.jpg",
    "picture.webp",
    "picture.gif",
    "picture.bmp",
    "palette.png",
    "sixteen.png",
    "frames.gif",
    "turned.jpg",
)

READERS: tuple[Target, ...] = (
    Target("openai .pt", _converted, ("openai.pt",), rewritten("openai.pt", _poisoned, _poisoned, zip_damaged, _bombs)),
    Target("openai .pt of before 1.6", _converted, ("legacy.pt",), rewritten("legacy.pt", damaged, _legacy)),
    Target(
        "safetensors",
        lambda folder, dice: read(folder / "diffusers", _told(dice, TOLD)),
        ("diffusers",),
        rewritten("diffusers/unet/diffusion_pytorch_model.safetensors", safetensors_damaged),
    ),
    Target(
        "diffusers folder",
        lambda folder, dice: read(folder / "diffusers"),
        ("diffusers",),
        one_of(
            anywhere("diffusers"),
            rewritten("diffusers/unet/config.json", json_damaged),
            rewritten("diffusers/scheduler/scheduler_config.json", json_damaged),
        ),
    ),
    Target("our checkpoint, config.json", _config, ("ours",), rewritten("ours/config.json", json_damaged)),
    Target("our checkpoint, any file", _config, ("ours",), anywhere("ours")),
    Target(
        "our checkpoint, one file",
        lambda folder, dice: read(folder / "ours.safetensors"),
        ("ours.safetensors",),
        rewritten("ours.safetensors", safetensors_damaged),
    ),
    Target("run, any file", _run, ("run",), anywhere("run"), _of_a_run),
    Target(
        "run, metrics.csv",
        _run,
        ("run",),
        one_of(rewritten("run/metrics.csv", _csv), rewritten("run/evaluations.csv", _csv)),
        _of_a_run,
    ),
    Target(
        "run, JSON files",
        _run,
        ("run",),
        one_of(*(rewritten(f"run/{name}.json", json_damaged) for name in ("best", "run", "config"))),
        _of_a_run,
    ),
    Target(
        "run, state.npz",
        _state,
        ("run",),
        rewritten("run/checkpoints/00000010/state/state.npz", _npz, damaged),
        _of_a_run,
    ),
    Target("settings of a run", _settings, ("training.json",), rewritten("training.json", json_damaged)),
    Target("jcm (MessagePack)", _jcm, ("jcm",), rewritten("jcm", damaged)),
    Target(
        "weights of a judge", _weights, ("weights.safetensors",), rewritten("weights.safetensors", safetensors_damaged)
    ),
    Target("Inception (TorchScript)", _inception, ("inception.pt",), rewritten("inception.pt", _poisoned, zip_damaged)),
    Target("LPIPS (pickle of arrays)", _lpips, ("arrays.ckpt",), rewritten("arrays.ckpt", damaged, _injected)),
    Target("statistics .npz", _statistics, ("statistics.npz",), rewritten("statistics.npz", _npz)),
    Target("images .npz", _arrays_of_images, ("images.npz",), rewritten("images.npz", _npz)),
    Target("mask", _mask, ("mask.png",), rewritten("mask.png", damaged, _png)),
    Target("image folder", _image_folder, ("folder",), anywhere("folder")),
    *map(_picture, PICTURES),
)
