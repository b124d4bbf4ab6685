"""Readers of third-party and native files: what they read, and what they may write."""

import dataclasses
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.published import resolve
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.pickles import read_arrays
from cm_jax.conversion.torch_files import read_torch
from cm_jax.data import ImageFolder, NpzData
from cm_jax.editing import photos
from cm_jax.errors import InputError
from cm_jax.evaluation import features
from cm_jax.evaluation.image_sets import open_images
from cm_jax.feature_networks import lpips
from cm_jax.training.config import TrainConfig
from cm_jax.training.run import history
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, METRICS, MetricsLog, read_metrics
from cm_jax.training.run.provenance import record_start
from tools.fuzz import seeds
from tools.fuzz.damage import damage, damaged

HINTS = CheckpointHints(head_dim=16, preconditioning="consistency", num_levels=18, image_size=8)
Read = Callable[[Path, random.Random], Any]
"""Called with the path of the damaged file or folder."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader and the file or folder of seeds.write that it reads."""

    file: str
    read: Read
    damaged: str = "*"
    """Pattern of the files in a folder that are damaged."""
    writes: tuple[str, ...] = ()
    """Beginnings of the names that it may write."""

    def prepare(self, valid: Path, folder: Path, rng: random.Random) -> None:
        """Copy the valid file or folder into `folder`, and damage one file."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns about two entries with one name
            if (valid / self.file).is_dir():
                top = shutil.copytree(valid / self.file, folder / self.file)
                damage(rng.choice(sorted(path for path in top.rglob(self.damaged) if path.is_file())), rng)
            else:
                (folder / self.file).write_bytes(damaged((valid / self.file).read_bytes(), rng))


def _checkpoint(hints: CheckpointHints | None = None, **changes: Any) -> Read:
    """Reads a checkpoint with these hints, or sometimes without."""
    given = dataclasses.replace(hints or CheckpointHints(), **changes)
    return lambda path, rng: read(path, given if rng.random() < 0.8 else CheckpointHints())


def _run(run: Path, rng: random.Random) -> None:
    """Every way to resume a run or to load from it."""
    ways: list[Callable[[], Any]] = [
        lambda: read(resolve(run)),
        lambda: read(resolve(run / "best")),
        lambda: read_metrics(run / METRICS),
        lambda: read_metrics(run / EVALUATIONS),
        lambda: record_start(run, 10, ["train.py"]),
        lambda: history.read_history(run),
        lambda: _resume(run, rng),
        lambda: MetricsLog(run, 5).close(),
    ]
    failures = []
    for way in ways:
        try:
            way()
        except InputError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _resume(run: Path, rng: random.Random) -> None:
    with RunFolder(run) as opened:
        opened.best()
        opened.resume(seeds.STATE)


def _train_config(file: Path, rng: random.Random) -> None:
    text = file.read_text("utf-8", "replace")
    serialization.from_text(text, TrainConfig, history.FORMAT, str(file), "the config of a run")


def _images(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        open_images(str(file))
    else:
        NpzData(str(file)).open(rng.choice([4, 8, 16]))


def _picture(file: Path, rng: random.Random) -> None:
    picture = photos.read(file)
    photos.paste_back(picture, np.zeros((8, 8, 3), np.uint8) + (photos.fit(picture, 8) > 2).astype(np.uint8))


RECORDS = tuple(
    f"run/{name}"
    for name in ("run.json", "config.json", ".lock", "metrics.csv", "evaluations.csv", "tensorboard", "checkpoints")
)
"""What a resumed run may change, but for the checkpoints themselves."""
PICTURES = (
    *("picture.png", "picture.jpg", "picture.webp", "picture.gif", "picture.bmp"),
    *("palette.png", "sixteen.png", "frames.gif", "turned.jpg"),
)

TARGETS: dict[str, Target] = {
    "openai .pt": Target("openai.pt", _checkpoint(HINTS)),
    "openai .pt before 1.6": Target("legacy.pt", _checkpoint(HINTS)),
    "training checkpoint": Target("wrapped.pt", _checkpoint(HINTS, key="ema")),
    "diffusers folder": Target("diffusers", _checkpoint()),
    "diffusers, JSON": Target("diffusers", _checkpoint(), "*.json"),
    "diffusers, sharded": Target("sharded", _checkpoint()),
    "native folder": Target("native", _checkpoint()),
    "native folder, JSON": Target("native", _checkpoint(), "config.json"),
    "native file": Target("native.safetensors", _checkpoint()),
    "EDM family": Target("edm.pkl", _checkpoint()),
    "jcm": Target("jcm", _checkpoint(HINTS, head_dim=None)),
    "run": Target("run", _run, writes=RECORDS),
    "run, tables": Target("run", _run, "*.csv", RECORDS),
    "run, JSON": Target("run", _run, "*.json", RECORDS),
    "run, state": Target("run", _resume, "state.npz", RECORDS),
    "config of a run": Target("training.json", _train_config),
    "weights of a metric network": Target(
        "weights.safetensors", lambda file, rng: lpips.FILE.load(str(file), seeds.WEIGHTS)
    ),
    "TorchScript": Target("inception.pt", lambda file, rng: [each.read() for each in read_torch(file).values()]),
    "pickle of arrays": Target("arrays.ckpt", lambda file, rng: [each.read() for each in read_arrays(file).values()]),
    "statistics": Target(
        "statistics.npz", lambda file, rng: features.open_reference(str(file), ("pool", "spatial"), (8, 8, 3))
    ),
    "images": Target("images.npz", _images),
    "mask": Target("mask.png", lambda file, rng: photos.hole_from_mask(photos.read_mask(file), 20, 24)),
    "image folder": Target(
        "folder", lambda top, rng: ImageFolder(str(top), labels=rng.choice(["auto", "none", "folder"])).open(8)
    ),
    **{name: Target(name, _picture) for name in PICTURES},
}
