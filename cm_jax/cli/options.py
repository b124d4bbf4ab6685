"""Options that several commands share."""

import dataclasses
from pathlib import Path
from typing import Literal

from cm_jax.cli.parsing import numbers
from cm_jax.io.atomic import user_cache
from cm_jax.model import Model, SamplingPlan
from cm_jax.samplers import NoiseLevelArgs
from cm_jax.types import Precision

LARGEST_GRID = 4096
"""Images in a grid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    compilation_cache: str = ""
    """Folder for JAX's compilation cache, or "off". Default: in the user's cache folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches(Compilation):
    seed: int = 0
    """Random seed. The images do not depend on the batch size or the devices."""
    batch_size: int | None = None
    """Images per batch over all devices. Default: 64 per device, fewer above 64 pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(Batches):
    precision: Precision = "float32"
    """Precision of matrix products and convolutions in the network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics(Batches):
    inception: str = ""
    """Weights of Inception-V3, written by `convert --to inception`. Default: the file named by CM_JAX_INCEPTION."""
    reference_cache: str = ""
    """Folder for cached statistics of references, or "off". Default: in the user's cache folder."""

    @property
    def cache(self) -> Path | None:
        return None if self.reference_cache == "off" else Path(self.reference_cache or user_cache("references"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    steps: int | None = None
    """Number of sampling steps. Uses the checkpoint's tuned noise levels if it has some. Default: 1; 40 for a
    denoiser."""
    timesteps: str = ""
    """Timesteps in diffusers' convention, decreasing to 0: "22,0"."""
    indices: str = ""
    """Timesteps in OpenAI's convention, increasing from 0 to N - 1: "0,22,39"."""
    sigmas: str = ""
    """Noise levels, decreasing: "80,1.38". A closing 0, as in k-diffusion, is the sampler's final level."""

    @property
    def levels(self) -> NoiseLevelArgs:
        return {
            "steps": self.steps,
            "timesteps": numbers("timesteps", self.timesteps, int),
            "indices": numbers("indices", self.indices, int),
            "sigmas": numbers("sigmas", self.sigmas, float),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Levels):
    sampler: Literal["consistency", "heun", "euler", "dpm", "ancestral", "progdist"] | None = None
    """Sampling algorithm. Default: consistency; heun for a denoiser."""

    def plan(self, model: Model) -> SamplingPlan:
        return model.plan(sampler=self.sampler, **self.levels)
