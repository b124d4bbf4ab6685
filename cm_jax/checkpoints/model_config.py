"""The config of a model: everything but its parameters. Checkpoints store it as JSON."""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Float, Int

from cm_jax.checkpoints import class_labels, serialization
from cm_jax.checkpoints.class_labels import ClassLabels
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import NUM_LEVELS, KarrasSchedule
from cm_jax.diffusion.preconditioning import (
    AnyPreconditioning,
    ConsistencyPreconditioning,
    LogSigmaPreconditioning,
    MeanFlowPreconditioning,
    TrigFlowPreconditioning,
)
from cm_jax.errors import InputError, check_int
from cm_jax.networks import ADMUNet, AnyNetwork

FORMAT = 1
"""Version of the config format. A newer one is refused with the advice to upgrade."""


@dataclasses.dataclass(frozen=True)
class Latents:
    """The latents of an autoencoder that a model samples in place of images: x = scale * latent + bias (EDM2)."""

    autoencoder: str
    """Its name on the Hugging Face Hub."""
    scale: tuple[float, ...]
    """One for each channel, as is bias."""
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "bias", tuple(self.bias))
        if not (all(map(math.isfinite, self.scale + self.bias)) and all(self.scale)):
            raise InputError(f"Expected finite scales and biases of latents, and no scale of 0, got {self}.")

    def decodable(self, x: Float[np.ndarray, "... c"]) -> Float[np.ndarray, "... c"]:
        """(x - bias) / scale, the input of the autoencoder's decoder."""
        return (x - np.asarray(self.bias, np.float32)) / np.asarray(self.scale, np.float32)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network, its preconditioning and noise schedule, and its class names and tuned noise levels where known.

    Raises InputError for contradictions between the fields.
    """

    network: AnyNetwork
    preconditioning: AnyPreconditioning
    schedule: KarrasSchedule = KarrasSchedule()
    num_levels: int = NUM_LEVELS
    """N, the number of noise levels that timesteps and indices count: 2 to 2^20."""
    class_names: tuple[str, ...] = ()
    """Names of class 0, 1, ...; empty for a model without classes or names."""
    tuned_timesteps: tuple[tuple[int, ...], ...] = ()
    """Tuned level indices, descending to 0 as diffusers writes them: ((22, 0),) for two steps."""
    tuned_sigmas: tuple[tuple[float, ...], ...] = ()
    """Tuned noise levels, descending: ((80.0, 0.821),) for two steps. A number of steps has either these or tuned
    timesteps."""
    clip_denoised: bool = True
    """Whether samplers clip denoised images to [-1, 1] by default. False for models of the EDM family."""
    consistency: bool | None = None
    """Whether it is a consistency function; None: as the preconditioning implies. ECT and sCM train consistency
    functions with the preconditioning of a denoiser."""
    latents: Latents | None = None
    """For a model of latents in place of images."""
    label_dropout: float | None = None
    """Rate of label dropout in training, without which the network cannot be used without labels. None: unknown."""
    guidance_range: tuple[float, float] | None = None
    """Guidance strengths that a network with guidance_embedding was trained with. None: no such network, or unknown."""

    default_sampler: str = ""
    """Name of the sampler to use by default (cm_jax.samplers.SAMPLERS). Empty: consistency, or heun for a denoiser."""
    default_steps: int | None = None
    """Number of its steps by default. None: 1, or 40 for a denoiser."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.default_steps is not None:
            check_int("default_steps", self.default_steps, 1, 10_000)
        for name in ("tuned_timesteps", "tuned_sigmas"):
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))
        if self.guidance_range is not None:
            object.__setattr__(self, "guidance_range", tuple(self.guidance_range))
        check_int("num_levels", self.num_levels, 2, 2**20)
        if self.class_names and len(self.class_names) != self.network.classes:
            raise InputError(f"{len(self.class_names)} class names for {self.network.classes} classes.")
        channels = self.network.image_shape[2]
        if self.latents and not len(self.latents.scale) == len(self.latents.bias) == channels:
            raise InputError(f"Expected {channels} scales and biases, got {self.latents}.")
        for steps in self.tuned_timesteps:
            if any(a <= b for a, b in itertools.pairwise((self.num_levels, *steps))) or steps[-1:] != (0,):
                expected = f"tuned timesteps that descend from below num_levels={self.num_levels} to 0"
                raise InputError(f"Expected {expected}, got {steps}.")
        for sigmas in self.tuned_sigmas:
            if not sigmas or any(not a > b for a, b in itertools.pairwise((math.inf, *sigmas, 0))):
                raise InputError(f"Expected positive, finite tuned sigmas that descend, got {sigmas}.")
        both = set(map(len, self.tuned_timesteps)) & set(map(len, self.tuned_sigmas))
        if both:
            raise InputError(f"Expected tuned timesteps or tuned sigmas for {min(both)} steps, got both; keep one.")

    @property
    def function(self) -> ConsistencyFunction:
        return ConsistencyFunction(self.network, self.preconditioning, self.schedule)

    @property
    def adm(self) -> ADMUNet:
        """The network as an ADM U-Net. Raises InputError for any other, which PyTorch formats cannot hold."""
        if not isinstance(self.network, ADMUNet):
            kind = type(self.network).__name__
            raise InputError(f"The formats of OpenAI and diffusers hold ADM U-Nets, got a {kind}: use --to edm.")
        return self.network

    @property
    def log_sigma_preconditioning(self) -> LogSigmaPreconditioning:
        """The preconditioning with c_noise proportional to ln sigma. Raises InputError for any other."""
        if isinstance(self.preconditioning, LogSigmaPreconditioning) and not isinstance(
            self.preconditioning, TrigFlowPreconditioning
        ):
            return self.preconditioning
        raise InputError(
            "Third-party formats hold networks with c_noise proportional to ln sigma, and this one has "
            f"{type(self.preconditioning).__name__}: use the native format."
        )

    @property
    def distilled(self) -> bool:
        """Whether it is a consistency function, which samples in one step, and not a denoiser D."""
        if self.consistency is not None:
            return self.consistency
        return isinstance(self.preconditioning, ConsistencyPreconditioning | MeanFlowPreconditioning)

    @property
    def usual_sampler(self) -> str:
        """Name of the sampler to use by default."""
        return self.default_sampler or ("consistency" if self.distilled else "heun")

    def check_pixels(self) -> None:
        """Raise InputError for a model of latents, whose samples only its autoencoder turns into images."""
        if self.latents is not None:
            raise InputError(
                f"Expected a model of images, got one of latents of {self.latents.autoencoder}: sample them into an "
                ".npz file, and decode them with that autoencoder."
            )

    def class_numbers(self, labels: ClassLabels | None, count: int) -> Int[np.ndarray, " n"] | None:
        """Class numbers for `count` images; None for an unconditional model.

        A class with several names, "tench, Tinca tinca", is found by each. Raises InputError for unknown and ambiguous
        labels, for a wrong number of labels, for labels of an unconditional model, and for a class-conditional model
        without labels.
        """
        classes = self.network.classes
        if classes is None:
            if labels is not None:
                raise InputError("Expected no labels for an unconditional model; leave them out.")
            return None
        if labels is None:
            known = class_labels.described_classes(self.class_names)
            raise InputError(
                f"Expected labels in [0, {classes - 1}], as this model is class-conditional: give labels (--labels)"
                f"{known and f', by number or name: {known}'}."
            )
        return class_labels.class_numbers(labels, count, classes, self.class_names)

    def to_json(self) -> str:
        return serialization.to_text(self, FORMAT)

    @classmethod
    def from_json(cls, text: str, source: str) -> "ModelConfig":
        """The inverse of `to_json`. Raises InputError for an invalid config; `source` names the file in messages."""
        return serialization.from_text(text, cls, FORMAT, source, "the config of a cm_jax checkpoint")
