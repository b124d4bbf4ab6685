"""Options that several commands share."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from cm_jax import conversion
from cm_jax.checkpoints.published import resolve
from cm_jax.cli.parsing import numbers
from cm_jax.cli.running import say
from cm_jax.errors import InputError
from cm_jax.io.atomic import user_cache, user_path
from cm_jax.loading import from_source
from cm_jax.model import Model, SamplingPlan
from cm_jax.samplers import DPM, Churn, Heun, NoiseLevelArgs, Sampler, sampler_named
from cm_jax.types import Precision


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
class WhichWeights:
    """For every command that reads a checkpoint: which of its networks and EMAs."""

    key: str | None = None
    """For files with several networks: the key or prefix of the one to read, such as ema. Default: the only network;
    ema for .pkl files."""
    ema: str = ""
    """For runs: the EMA to read, by its decay (0.9999) or width (power_0.1), or none for the parameters without EMA.
    Default: the one that the run samples from."""

    def read(self, path: Path, name: str = "", **settings: Any) -> conversion.Source:
        """A checkpoint. Prints what was chosen or left out in reading it, after a name for the checkpoint, if any.

        settings: further ones of CheckpointHints.
        """
        source = conversion.read(path, conversion.CheckpointHints(key=self.key, ema=self.ema or None, **settings))
        for note in source.notes:
            say(f"{name}: {note}" if name else note)
        return source

    def load(self, path: Path, precision: Precision = "float32", name: str = "") -> Model:
        """The model of a checkpoint; prints as `read`."""
        return from_source(self.read(path, name), precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics(Batches):
    batch_size: int | None = None
    """Images per batch over all devices. Default: 64 per device for samples, fewer above 64 pixels; 32 for features."""
    inception: str = ""
    """Weights of Inception-V3, written by `convert --to inception`. Default: the file named by CM_JAX_INCEPTION."""
    reference_cache: str = ""
    """Folder for cached statistics of references, or "off". Default: in the user's cache folder."""

    @property
    def cache(self) -> Path | None:
        return None if self.reference_cache == "off" else user_path(self.reference_cache or user_cache("references"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    steps: int | None = None
    """Number of sampling steps. Uses the checkpoint's tuned noise levels if it has some. Default: 1; 40 for a
    denoiser; for progressive distillation, the number that the model was distilled to."""
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
    sampler: str | None = None
    """Sampling algorithm: consistency, heun, euler, dpm, ancestral, progdist, segments, vp, ve, or a registered one.
    Default: consistency; heun for a denoiser; progdist for a model of progressive distillation."""
    churn: str = ""
    """Noise added in each step of heun or dpm: S_churn[,S_min,S_max,S_noise], e.g. "40,0.05,50,1.003"."""
    clip: Literal["on", "off"] | None = None
    """Clip denoised images to [-1, 1]. Default: on; off for models of the EDM family."""

    guidance: float | None = None
    """Guidance strength g of a denoiser: D_ref + g (D - D_ref), by itself without labels or by --guidance-model. Also
    for a consistency model distilled with a range of strengths. Default: 1, no guidance."""
    guidance_model: str = ""
    """Checkpoint of the denoiser D_ref: a weaker model (autoguidance) or an unconditional one."""
    guidance_key: str | None = None
    """For --guidance-model: as --key."""
    guidance_ema: str = ""
    """For --guidance-model: as --ema. Default: the one that its run samples from."""
    guidance_interval: str = ""
    """Noise levels lo,hi between which guidance applies: "0.28,2.9". Default: all."""

    def __post_init__(self) -> None:
        if self.sampler is not None:
            sampler_named(self.sampler)

    def plan(self, model: Model) -> SamplingPlan:
        """The plan of these options. Raises InputError."""
        guide, clip = None, None if self.clip is None else self.clip == "on"
        if self.guidance_model:
            weights = WhichWeights(key=self.guidance_key, ema=self.guidance_ema)
            guide = weights.load(resolve(self.guidance_model), model.config.network.precision, "--guidance-model")
        elif self.guidance_key or self.guidance_ema:
            raise InputError("--guidance-key and --guidance-ema apply to --guidance-model: add it, or leave them out.")
        interval = numbers("guidance-interval", self.guidance_interval, float)
        given = {"guidance": self.guidance, "guide": guide, "guidance_interval": interval}
        return model.plan(sampler=self._churned(model), clip=clip, **given, **self.levels)

    def _churned(self, model: Model) -> str | Sampler | None:
        values = numbers("churn", self.churn, float)
        if values is None:
            return self.sampler
        name = self.sampler or model.config.usual_sampler
        sampler = sampler_named(name)
        if not isinstance(sampler, Heun | DPM):
            raise InputError(f"--churn needs --sampler heun or dpm, got {name}.")
        if len(values) > 4:
            raise InputError(f"Expected --churn S_churn[,S_min,S_max,S_noise], got {self.churn!r}.")
        return dataclasses.replace(sampler, churn=Churn(*values))
