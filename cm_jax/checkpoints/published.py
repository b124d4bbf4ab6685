"""The published checkpoints: what their file names say that their tensors cannot.

Levels and tuned timesteps are those of the originals' sampling commands (openai/consistency_models, scripts/launch.sh;
openai/consistency_models_cifar10, launch.sh and its notebook).
"""

import dataclasses
import functools
import importlib.resources
from pathlib import Path

_EMOJI_CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A checkpoint that people know by name."""

    name: str
    image_size: int
    levels: int
    parameters: int
    """Of its network: what else has its name is another checkpoint."""
    head_dim: int = 64
    timesteps: tuple[int, ...] = ()
    """Tuned levels for two steps, as diffusers writes them; empty where none were published."""
    class_names: tuple[str, ...] = ()

    @property
    def preconditioning(self) -> str:
        return "edm" if self.name.startswith("edm_") else "consistency"

    @property
    def url(self) -> str:
        return f"https://openaipublic.blob.core.windows.net/consistency/{self.name}.pt"


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Names of the 1000 ImageNet classes in the order of their WordNet ids, as the published networks number them."""
    text = importlib.resources.files("cm_jax.assets").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


@functools.cache
def published() -> dict[str, Published]:
    """Every checkpoint that is known by name: the twelve of OpenAI, and the bundled one of the same code."""
    imagenet = {"image_size": 64, "parameters": 295_899_267, "class_names": imagenet_classes()}
    lsun = 526_304_771
    known = [
        Published("edm_imagenet64_ema", levels=40, **imagenet),
        Published("cd_imagenet64_l2", levels=40, timesteps=(22, 0), **imagenet),
        Published("cd_imagenet64_lpips", levels=40, timesteps=(22, 0), **imagenet),
        Published("ct_imagenet64", levels=201, timesteps=(106, 0), **imagenet),
        Published("edm_bedroom256_ema", 256, levels=40, parameters=lsun),
        Published("cd_bedroom256_l2", 256, levels=40, parameters=lsun, timesteps=(18, 0)),
        Published("cd_bedroom256_lpips", 256, levels=40, parameters=lsun, timesteps=(17, 0)),
        Published("ct_bedroom256", 256, levels=151, parameters=lsun, timesteps=(67, 0)),
        Published("edm_cat256_ema", 256, levels=40, parameters=lsun),
        Published("cd_cat256_l2", 256, levels=40, parameters=lsun),
        Published("cd_cat256_lpips", 256, levels=40, parameters=lsun),
        Published("ct_cat256", 256, levels=151, parameters=lsun, timesteps=(62, 0)),
        Published("emoji16_cd", 16, 18, 1_923_907, head_dim=32, timesteps=(8, 0), class_names=_EMOJI_CLASSES),
    ]
    return {entry.name: entry for entry in known}


def recognize(path: Path) -> Published | None:
    """The published checkpoint that a file or folder is by its name: "ct_cat256.pt", "diffusers-cd_cat256_l2"."""
    stems = (path.name.removesuffix(".pt").removesuffix(".bin"), path.resolve().name.removesuffix(".pt"))
    matches = [entry for name, entry in published().items() if any(name in stem for stem in stems)]
    return max(matches, key=lambda entry: len(entry.name), default=None)


@dataclasses.dataclass(frozen=True)
class PublishedCIFAR10:
    """A CIFAR-10 checkpoint of openai/consistency_models_cifar10: an NCSN++ at 32 pixels."""

    name: str
    step: int | None = None
    """Number of its file, checkpoints/checkpoint_{step}; None for the teacher, which is a file itself."""
    levels: int = 18
    timesteps: tuple[int, ...] = ()
    """Tuned levels for two steps; empty where none were published."""

    @property
    def preconditioning(self) -> str:
        return "edm" if self.name.startswith("edm_") else "consistency"

    @property
    def url(self) -> str:
        inside = "" if self.step is None else f"/checkpoints/checkpoint_{self.step}"
        return f"https://openaipublic.blob.core.windows.net/consistency/jcm_checkpoints/{self.name}{inside}"


@functools.cache
def published_cifar10() -> dict[str, PublishedCIFAR10]:
    """The ten CIFAR-10 checkpoints of OpenAI. Levels of the continuous-time ones are those of its samplers."""
    known = [
        PublishedCIFAR10("edm_cifar10_ema"),
        PublishedCIFAR10("cd-l1", 80),
        PublishedCIFAR10("cd-l2", 80),
        PublishedCIFAR10("cd-lpips", 80, timesteps=(11, 0)),
        PublishedCIFAR10("ct-lpips", 74, levels=151),
        PublishedCIFAR10("cifar10-continuous-cd-l2", 40),
        PublishedCIFAR10("cifar10-continuous-cd-l2-stopgrad", 40),
        PublishedCIFAR10("cifar10-continuous-cd-lpips-stopgrad", 40),
        PublishedCIFAR10("continuous-ct-l2", 80),
        PublishedCIFAR10("continuous-ct-lpips", 40),
    ]
    return {entry.name: entry for entry in known}


def recognize_cifar10(path: Path) -> PublishedCIFAR10 | None:
    """The published CIFAR-10 checkpoint that a file is: by its own name, or its folder's ("cd-l2/checkpoints/...").

    The whole name must agree, because these are short.
    """
    parts = [place for spelling in (path.absolute(), path.resolve()) for place in spelling.parts[-3:]]
    return next((entry for name, entry in published_cifar10().items() if name in parts or name == path.stem), None)


BUNDLED = {"emoji32": "emoji32.safetensors", "emoji16_cd": "emoji16_cd.pt"}
"""The files of the checkpoints in this package: one that was trained by it, and one by the original's code."""
DEFAULT = "emoji32"
"""The bundled checkpoint that is used where none is named."""


def bundled_path(name: str) -> Path:
    """Where a bundled checkpoint lies on disk."""
    return Path(str(importlib.resources.files("cm_jax.assets").joinpath(BUNDLED[name])))
