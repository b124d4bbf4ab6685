"""Readers of third-party and native files, and the mutations of their files."""

import dataclasses
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.published import resolve
from cm_jax.conversion import CheckpointHints, metric_networks, read
from cm_jax.conversion.pickles import read_arrays
from cm_jax.conversion.torch_files import read_torch
from cm_jax.data import ImageFolder, NpzData
from cm_jax.editing import photos
from cm_jax.errors import InputError
from cm_jax.evaluation import features
from cm_jax.evaluation.image_sets import open_images
from cm_jax.feature_networks import lpips
from cm_jax.training import loop
from cm_jax.training.config import TrainConfig
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import EVALUATIONS, METRICS, MetricsLog, read_metrics
from cm_jax.training.run.provenance import record_start
from tools.fuzz import seeds
from tools.fuzz.damage import damaged, json_damaged, safetensors_damaged, zip_damaged
from tools.fuzz.mutations import (
    Mutation,
    bomb,
    csv,
    in_file,
    in_folder,
    injected,
    legacy_pickle,
    npz,
    one_of,
    persistence_pickle,
    png,
    zipped_pickle,
)

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
    mutate: Mutation
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


def _read_all(tensors: Any) -> None:
    for tensor in tensors.values():
        tensor.read()


def _hints(rng: random.Random, hints: CheckpointHints) -> CheckpointHints:
    """Complete hints, or none."""
    return hints if rng.random() < 0.8 else CheckpointHints()


def _read_checkpoint(folder: Path, rng: random.Random) -> None:
    read(
        folder / next(name for name in ("openai.pt", "legacy.pt", "jcm") if (folder / name).exists()),
        _hints(rng, HINTS),
    )


def _read_jcm(folder: Path, rng: random.Random) -> None:
    read(folder / "jcm", _hints(rng, _JCM_HINTS))


def _read_edm(folder: Path, rng: random.Random) -> None:
    read(folder / "edm.pkl")


def _read_run(folder: Path, rng: random.Random) -> None:
    """Every way to resume a run or to load from it."""
    run = folder / "run"
    ways: list[Callable[[], Any]] = [
        lambda: read(resolve(run)),
        lambda: read(resolve(run / "best")),
        lambda: read_metrics(run / METRICS),
        lambda: read_metrics(run / EVALUATIONS),
        lambda: record_start(run, 10, ["train.py"]),
        lambda: loop._stored_config(run / "config.json"),
        lambda: _resume(run),
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


def _resume(run: Path) -> None:
    with RunFolder(run) as opened:
        opened.best()
        opened.resume(seeds.STATE)


def _is_run_record(name: str, outcome: str) -> bool:
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


def _read_state(folder: Path, rng: random.Random) -> None:
    _resume(folder / "run")


def _read_train_config(folder: Path, rng: random.Random) -> None:
    file = folder / "training.json"
    serialization.from_text(
        file.read_text("utf-8", "replace"), TrainConfig, loop.FORMAT, str(file), "the config of a run"
    )


def _read_statistics(folder: Path, rng: random.Random) -> None:
    features.open_reference(str(folder / "statistics.npz"), ("pool", "spatial"), (8, 8, 3))


def _read_images(folder: Path, rng: random.Random) -> None:
    file = str(folder / "images.npz")
    if rng.random() < 0.3:
        open_images(file)
    else:
        NpzData(file).open(rng.choice([4, 8, 16]))


def _read_picture(folder: Path, rng: random.Random) -> None:
    (file,) = folder.iterdir()
    picture = photos.read(file)
    photos.paste_back(picture, np.zeros((8, 8, 3), np.uint8) + (photos.fit(picture, 8) > 2).astype(np.uint8))


def _read_mask(folder: Path, rng: random.Random) -> None:
    photos.fit_hole(photos.hole_from_mask(photos.read_mask(folder / "mask.png"), 20, 24), 8)


def _read_image_folder(folder: Path, rng: random.Random) -> None:
    ImageFolder(str(folder / "folder"), labels=rng.choice(["auto", "none", "folder"])).open(8)


def _picture_target(name: str) -> Target:
    ways = (damaged, damaged, png) if name.endswith(".png") else (damaged,)
    return Target(f"picture, {name}", _read_picture, (name,), in_file(name, *ways))


def _read_weights(folder: Path, rng: random.Random) -> None:
    lpips.FILE.load(str(folder / "weights.safetensors"), seeds.WEIGHTS)


def _read_inception(folder: Path, rng: random.Random) -> None:
    _read_all(read_torch(folder / "inception.pt"))
    metric_networks.read_inception(folder / "inception.pt")


def _read_lpips(folder: Path, rng: random.Random) -> None:
    _read_all(read_arrays(folder / "arrays.ckpt"))
    metric_networks.read_lpips(folder / "arrays.ckpt")


def _read_native(folder: Path, rng: random.Random) -> None:
    jax.tree.leaves(read(folder / "native", HINTS if rng.random() < 0.1 else CheckpointHints()).params)


PICTURES = (
    *("picture.png", "picture.jpg", "picture.webp", "picture.gif", "picture.bmp"),
    *("palette.png", "sixteen.png", "frames.gif", "turned.jpg"),
)

READERS: tuple[Target, ...] = (
    Target(
        "openai .pt",
        _read_checkpoint,
        ("openai.pt",),
        in_file("openai.pt", zipped_pickle, zipped_pickle, zip_damaged, bomb),
    ),
    Target("openai .pt before 1.6", _read_checkpoint, ("legacy.pt",), in_file("legacy.pt", damaged, legacy_pickle)),
    Target(
        "safetensors",
        lambda folder, rng: read(folder / "diffusers", _hints(rng, HINTS)),
        ("diffusers",),
        in_file("diffusers/unet/diffusion_pytorch_model.safetensors", safetensors_damaged),
    ),
    Target(
        "diffusers folder",
        lambda folder, rng: read(folder / "diffusers"),
        ("diffusers",),
        one_of(
            in_folder("diffusers"),
            in_file("diffusers/unet/config.json", json_damaged),
            in_file("diffusers/scheduler/scheduler_config.json", json_damaged),
        ),
    ),
    Target("native checkpoint, config.json", _read_native, ("native",), in_file("native/config.json", json_damaged)),
    Target("native checkpoint, any file", _read_native, ("native",), in_folder("native")),
    Target(
        "native checkpoint, one file",
        lambda folder, rng: read(folder / "native.safetensors"),
        ("native.safetensors",),
        in_file("native.safetensors", safetensors_damaged),
    ),
    Target("run, any file", _read_run, ("run",), in_folder("run"), _is_run_record),
    Target(
        "run, metrics.csv",
        _read_run,
        ("run",),
        one_of(in_file("run/metrics.csv", csv), in_file("run/evaluations.csv", csv)),
        _is_run_record,
    ),
    Target(
        "run, JSON files",
        _read_run,
        ("run",),
        one_of(*(in_file(f"run/{name}.json", json_damaged) for name in ("best", "run", "config"))),
        _is_run_record,
    ),
    Target(
        "run, state.npz",
        _read_state,
        ("run",),
        in_file("run/checkpoints/00000010/state/state.npz", npz, damaged),
        _is_run_record,
    ),
    Target("config of a run", _read_train_config, ("training.json",), in_file("training.json", json_damaged)),
    Target(
        "EDM family (persistence pickle)",
        _read_edm,
        ("edm.pkl",),
        in_file("edm.pkl", damaged, injected, persistence_pickle),
    ),
    Target("jcm (MessagePack)", _read_jcm, ("jcm",), in_file("jcm", damaged)),
    Target(
        "weights of a metric network",
        _read_weights,
        ("weights.safetensors",),
        in_file("weights.safetensors", safetensors_damaged),
    ),
    Target(
        "Inception (TorchScript)",
        _read_inception,
        ("inception.pt",),
        in_file("inception.pt", zipped_pickle, zip_damaged),
    ),
    Target("LPIPS (pickle of arrays)", _read_lpips, ("arrays.ckpt",), in_file("arrays.ckpt", damaged, injected)),
    Target("statistics .npz", _read_statistics, ("statistics.npz",), in_file("statistics.npz", npz)),
    Target("images .npz", _read_images, ("images.npz",), in_file("images.npz", npz)),
    Target("mask", _read_mask, ("mask.png",), in_file("mask.png", damaged, png)),
    Target("image folder", _read_image_folder, ("folder",), in_folder("folder")),
    *map(_picture_target, PICTURES),
)
