"""Readers of third-party and native files, and the mutations of their files."""

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
from cm_jax.checkpoints.resolve import resolve
from cm_jax.conversion import CheckpointHints, metric_networks, read
from cm_jax.conversion.pickles import read_arrays
from cm_jax.conversion.torch_files import read_torch
from cm_jax.data import ImageFolder, NpzData
from cm_jax.editing import photos
from cm_jax.errors import InputError
from cm_jax.evaluation import references
from cm_jax.evaluation.image_sets import open_images
from cm_jax.feature_networks import lpips
from cm_jax.presets import PRESETS
from cm_jax.training import loop
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, METRICS, Log, read_metrics
from cm_jax.training.run.provenance import record_start
from tools.fuzz import payloads, seeds
from tools.fuzz.damage import damaged, json_damaged, npy_damaged, safetensors_damaged, zip_damaged

HINTS = CheckpointHints(head_dim=16, preconditioning="consistency", num_levels=18, image_size=8)
_JCM_HINTS = CheckpointHints(preconditioning="consistency", num_levels=18, image_size=8)


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader: its input, the mutation of that input, and the files that it may write."""

    name: str
    use: Callable[[Path, random.Random], Any]
    """Called with the working folder, which contains `files` after the mutation."""
    files: tuple[str, ...]
    """Files or folders of seeds.write to copy."""
    mutate: Callable[[Path, random.Random], None]
    may_write: Callable[[str, str], bool] = lambda name, outcome: False
    """Called with the name of a file and the outcome (used or refused)."""

    def prepare(self, seed: Path, folder: Path, rng: random.Random) -> None:
        """Copy the valid files into an empty folder and damage them."""
        for name in self.files:
            copy = shutil.copytree if (seed / name).is_dir() else shutil.copyfile
            copy(seed / name, folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns about two entries with one name
            self.mutate(folder, rng)


def rewritten(name: str, *ways: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    """Damages the file `name` in one of these ways."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = folder / name
        file.write_bytes(rng.choice(ways)(file.read_bytes(), rng))

    return mutate


def one_of(*mutations: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: rng.choice(mutations)(folder, rng)


def anywhere(top: str) -> Callable[[Path, random.Random], None]:
    """Damages a file in a folder according to its suffix, removes it, or replaces it by a folder or another file."""

    def mutate(folder: Path, rng: random.Random) -> None:
        files = sorted(path for path in (folder / top).rglob("*") if path.is_file())
        file = rng.choice(files)
        what = rng.randrange(12)
        if what == 0:
            file.unlink()
        elif what == 1:
            file.unlink()
            file.mkdir()
        elif what == 2:
            shutil.copyfile(rng.choice(files), folder / "copied")
            (folder / "copied").replace(file)
        elif what == 3:
            shutil.rmtree(file.parent)
        else:
            kinds = {".json": json_damaged, ".safetensors": safetensors_damaged, ".npz": _npz}
            file.write_bytes(kinds.get(file.suffix, damaged)(file.read_bytes(), rng))

    return mutate


@functools.cache
def _pickles() -> list[bytes]:
    return payloads.pickles()


@functools.cache
def _bomb() -> bytes:
    return payloads.bomb("archive", 2**28)


def _injected(content: bytes, rng: random.Random) -> bytes:
    return payloads.injected(content, rng, _pickles())


def _poisoned(content: bytes, rng: random.Random) -> bytes:
    """A zip archive with a pickle that would execute code."""
    way = rng.choice([_injected, _injected, damaged])
    return zip_damaged(content, rng, lambda data, rng: way(data, rng) if data[:1] == b"\x80" else damaged(data, rng))


def _legacy(content: bytes, rng: random.Random) -> bytes:
    """A payload instead of one of the five pickles at the beginning."""
    end = content.index(b".", rng.choice([0, 30, 40, 60, 200])) + 1
    return content[:end] + rng.choice(_pickles()) + content[end:] if rng.random() < 0.5 else _injected(content, rng)


def _bombs(content: bytes, rng: random.Random) -> bytes:
    return _bomb() if rng.random() < 0.05 else damaged(content, rng)


def _npz(content: bytes, rng: random.Random) -> bytes:
    def member(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.2:  # an object array is a header and a pickle
            head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + rng.choice(_pickles())
        return npy_damaged(data, rng)

    return zip_damaged(content, rng, member)


def _png(content: bytes, rng: random.Random) -> bytes:
    """A PNG with another size, depth or color type in its header, and a matching checksum."""
    sizes = [0, 1, 7, 20, 8000, 8192, 2**16, 2**24, 2**31 - 1, 2**32 - 1]
    header = struct.pack(
        ">IIBBBBB",
        rng.choice(sizes),
        rng.choice(sizes),
        *(rng.choice([0, 1, 2, 3, 4, 8, 16, 255]) for _ in range(5)),
    )
    header = header[:8] + rng.choice([bytes([8, 2, 0, 0, 0]), header[8:]])
    return content[:12] + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


def _csv(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    cells = lines[place].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(
        ["", "nan", "-1", "1e999", "x", '"', "9" * 5000, "=cmd()", "\0", "\x1b[2J", "5.5", "batches", "٣", "1_0"]
    )
    lines[place] = ",".join(cells)
    return ("\n".join(lines) + rng.choice(["", "\n", "\r", "\n\n"])).encode()


def _all_numbers(tensors: Any) -> None:
    for tensor in tensors.values():
        tensor.read()


def _hints(rng: random.Random, hints: CheckpointHints) -> CheckpointHints:
    """Complete hints, or none."""
    return hints if rng.random() < 0.8 else CheckpointHints()


def _converted(folder: Path, rng: random.Random) -> None:
    read(
        folder / next(name for name in ("openai.pt", "legacy.pt", "jcm") if (folder / name).exists()),
        _hints(rng, HINTS),
    )


def _jcm(folder: Path, rng: random.Random) -> None:
    read(folder / "jcm", _hints(rng, _JCM_HINTS))


def _run(folder: Path, rng: random.Random) -> None:
    """Every way to resume a run or to load from it."""
    run = folder / "run"
    ways: list[Callable[[], Any]] = [
        lambda: read(resolve(run)),
        lambda: read(resolve(run / "best")),
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
    """Files that a resumed run writes: truncated records and the lock, but no checkpoint."""
    records = (
        "run/run.json",
        "run/config.json",
        "run/.lock",
        "run/metrics.csv",
        "run/evaluations.csv",
        "run/tensorboard",
    )
    return name.startswith(records) or name in ("run", "run/checkpoints")


def _state(folder: Path, rng: random.Random) -> None:
    _resumed(folder / "run")


def _settings(folder: Path, rng: random.Random) -> None:
    file = folder / "training.json"
    serialization.from_text(
        file.read_text("utf-8", "replace"), TrainConfig, loop.FORMAT, str(file), "the config of a run"
    )


def _statistics(folder: Path, rng: random.Random) -> None:
    references.open_reference(str(folder / "statistics.npz"), ("pool", "spatial"), (8, 8, 3))


def _arrays_of_images(folder: Path, rng: random.Random) -> None:
    file = str(folder / "images.npz")
    if rng.random() < 0.3:
        open_images(file)
    else:
        NpzData(file).open(rng.choice([4, 8, 16]))


def _pictured(folder: Path, rng: random.Random) -> None:
    (file,) = folder.iterdir()
    picture = photos.read(file)
    photos.back(picture, np.zeros((8, 8, 3), np.uint8) + (photos.fitted(picture, 8) > 2).astype(np.uint8))


def _mask(folder: Path, rng: random.Random) -> None:
    photos.fitted_hole(photos.hole_of(photos.read(folder / "mask.png"), 20, 24), 8)


def _image_folder(folder: Path, rng: random.Random) -> None:
    ImageFolder(str(folder / "folder"), labels=rng.choice(["auto", "none", "folder"])).open(8)


def _picture(name: str) -> Target:
    ways = (damaged, damaged, _png) if name.endswith(".png") else (damaged,)
    return Target(f"picture, {name}", _pictured, (name,), rewritten(name, *ways))


def _weights(folder: Path, rng: random.Random) -> None:
    lpips.FILE.load(str(folder / "weights.safetensors"), seeds.WEIGHTS)


def _inception(folder: Path, rng: random.Random) -> None:
    _all_numbers(read_torch(folder / "inception.pt"))
    metric_networks.read_inception(folder / "inception.pt")


def _lpips(folder: Path, rng: random.Random) -> None:
    _all_numbers(read_arrays(folder / "arrays.ckpt"))
    metric_networks.read_lpips(folder / "arrays.ckpt")


def _config(folder: Path, rng: random.Random) -> None:
    jax.tree.leaves(read(folder / "native", HINTS if rng.random() < 0.1 else CheckpointHints()).params)


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
    Target("openai .pt before 1.6", _converted, ("legacy.pt",), rewritten("legacy.pt", damaged, _legacy)),
    Target(
        "safetensors",
        lambda folder, rng: read(folder / "diffusers", _hints(rng, HINTS)),
        ("diffusers",),
        rewritten("diffusers/unet/diffusion_pytorch_model.safetensors", safetensors_damaged),
    ),
    Target(
        "diffusers folder",
        lambda folder, rng: read(folder / "diffusers"),
        ("diffusers",),
        one_of(
            anywhere("diffusers"),
            rewritten("diffusers/unet/config.json", json_damaged),
            rewritten("diffusers/scheduler/scheduler_config.json", json_damaged),
        ),
    ),
    Target("native checkpoint, config.json", _config, ("native",), rewritten("native/config.json", json_damaged)),
    Target("native checkpoint, any file", _config, ("native",), anywhere("native")),
    Target(
        "native checkpoint, one file",
        lambda folder, rng: read(folder / "native.safetensors"),
        ("native.safetensors",),
        rewritten("native.safetensors", safetensors_damaged),
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
        "weights of a metric network",
        _weights,
        ("weights.safetensors",),
        rewritten("weights.safetensors", safetensors_damaged),
    ),
    Target("Inception (TorchScript)", _inception, ("inception.pt",), rewritten("inception.pt", _poisoned, zip_damaged)),
    Target("LPIPS (pickle of arrays)", _lpips, ("arrays.ckpt",), rewritten("arrays.ckpt", damaged, _injected)),
    Target("statistics .npz", _statistics, ("statistics.npz",), rewritten("statistics.npz", _npz)),
    Target("images .npz", _arrays_of_images, ("images.npz",), rewritten("images.npz", _npz)),
    Target("mask", _mask, ("mask.png",), rewritten("mask.png", damaged, _png)),
    Target("image folder", _image_folder, ("folder",), anywhere("folder")),
    *map(_picture, PICTURES),
)
