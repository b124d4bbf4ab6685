"""The choice of a sampler and its noise levels for a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm_jax.arguments import as_array
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.errors import InputError
from cm_jax.samplers import sampler_named
from cm_jax.samplers.base import NoiseLevelArgs, Sampler, choose_levels, levels_given
from cm_jax.samplers.guidance import Guidance

TEACHER_STEPS = 40
"""Default number of steps of a denoiser, as in OpenAI's implementation."""


class SamplingPlan(NamedTuple):
    """A sampler and its noise levels."""

    sampler: Sampler
    levels: tuple[float, ...]
    """Descending; the network is not evaluated at the last one."""
    guidance: Guidance | None = None
    """Guidance of a denoiser, or the strength for a consistency model that takes it as an input."""

    def described(self) -> dict[str, Any]:
        """What decides the images, besides the model and the seed, as JSON values."""
        settings = self.sampler.settings()
        return {
            "sampler": type(self.sampler).__name__,
            **({"sampler_settings": settings} if settings else {}),
            "steps": len(self.levels) - 1,
            "sigmas": list(self.levels[:-1]),
            "clip": self.sampler.clip is not False,
            **({} if self.guidance is None else self.guidance.described()),
        }


def sampler_text(described: Mapping[str, Any]) -> str:
    """The sampler of `SamplingPlan.described` in words: "Heun(churn=Churn(amount=40, ...))"."""
    settings = ", ".join(f"{name}={value}" for name, value in described.get("sampler_settings", {}).items())
    return described["sampler"] + (f"({settings})" if settings else "")


def guidance_text(described: Mapping[str, Any]) -> str:
    """The guidance of `SamplingPlan.described` in words: "guidance 2 for sigma in (0.28, 2.9]"; empty for none."""
    if "guidance" not in described:
        return ""
    guide = f" by the model of SHA-256 {described['guide_sha256'][:12]}" if "guide_sha256" in described else ""
    interval = f" for sigma in ({described['guidance_interval']}]" if "guidance_interval" in described else ""
    return f"guidance {described['guidance']:g}{guide}{interval}"


def make_plan(
    config: ModelConfig,
    sampler: str | Sampler | None,
    clip: bool | None = None,
    guidance: Guidance | None = None,
    **levels: Unpack[NoiseLevelArgs],
) -> SamplingPlan:
    """The plan of a model with this config. Raises InputError for unknown samplers and invalid levels."""
    usual = config.usual_sampler
    sampler = usual if sampler is None else sampler
    steps = config.default_steps if isinstance(sampler, str) and sampler == usual else None
    if not isinstance(sampler, Sampler):
        sampler = sampler_named(sampler)
    if not levels_given(levels):
        levels = NoiseLevelArgs(steps=steps or (1 if config.distilled else TEACHER_STEPS))
    if clip is not None or (sampler.clip is None and not config.clip_denoised):
        sampler = dataclasses.replace(sampler, clip=bool(clip))
    sampler = sampler.for_model(config.function)
    return SamplingPlan(sampler, _levels(config, sampler, levels), guidance)


def _levels(config: ModelConfig, sampler: Sampler, levels: NoiseLevelArgs) -> tuple[float, ...]:
    """The noise levels of a sampler, rounded to those of the network; equal levels become one."""
    schedule = config.schedule
    chosen = choose_levels(
        sampler,
        schedule,
        config.num_levels,
        boundary=config.preconditioning.boundary(schedule.sigma_min),
        tuned=config.tuned_timesteps,
        tuned_sigmas=config.tuned_sigmas,
        **levels,
    )
    rounded = tuple(dict.fromkeys(map(float, config.preconditioning.round_sigma(np.asarray(chosen)))))
    if len(rounded) < 2:
        raise InputError(f"Expected sigmas from {schedule.sigma_min:g}, the lowest level of this model.")
    return rounded


def checked_noise(noise: Any, images_shape: tuple[int, ...], plan: SamplingPlan) -> Float[Array | np.ndarray, "..."]:
    """`noise` as an array. Raises InputError unless it is enough for the plan."""
    array, steps = as_array("noise", noise), len(plan.levels) - 1
    needed = plan.sampler.num_noise_samples(steps)
    if array.shape[1:] != images_shape or array.shape[0] < needed or not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"Expected standard normal noise, floats {[needed, *images_shape]} for {steps} steps of this sampler; got "
            f"{list(array.shape)} of {array.dtype}."
        )
    return array
