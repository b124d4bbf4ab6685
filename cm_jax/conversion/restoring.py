"""What a file in a third-party format does not state of its model: the options that restore it, and what is lost."""

import dataclasses
from typing import Any, NamedTuple

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.edm_writing import config_as_read, head_dim, preconditioning_name
from cm_jax.conversion.hints import CheckpointHints
from cm_jax.diffusion.preconditioning import LogSigmaPreconditioning
from cm_jax.networks import SongUNet


class Unstated(NamedTuple):
    """What a file does not state of the model that was written to it."""

    hints: dict[str, Any]
    """The fields of CheckpointHints with which it must be read, with their values."""
    lost: tuple[str, ...]
    """The fields of the config that no hint restores."""

    def report(self) -> str:
        """The options of the commands for `hints`, and `lost`; empty if the file states everything."""
        options = " ".join(f"--{name.replace('_', '-')} {_word(name, value)}" for name, value in self.hints.items())
        lost = ", ".join(self.lost).replace("_", " ")
        lines = (options and f"To read it, give {options}.", lost and f"It does not contain: {lost}.")
        return "\n".join(filter(None, lines))


def unstated(kind: str, config: ModelConfig) -> Unstated:
    """What a file of this format does not state of a model that it can represent, as `write` checks."""
    if kind == "native" or (kind == "diffusers" and config.distilled):
        return Unstated({}, ())
    name = preconditioning_name(config)
    given: dict[str, Any] = {"preconditioning": name}
    if kind == "diffusers":
        return Unstated(given, ())
    if kind == "edm":
        found = config_as_read(config, name)
        given |= {} if isinstance(config.network, SongUNet) else {"head_dim": head_dim(config.network)}  # type: ignore[arg-type]
    else:
        found, network = ModelConfig(config.network, config.preconditioning), config.adm
        heads = {"head_dim": network.head_dim} if network.head_dim else {"heads": network.heads}
        given |= {"image_size": network.image_size, **heads, "num_levels": config.num_levels}
    given |= _changes(found.schedule, config.schedule, "sigma_min", "sigma_max", "rho")
    if isinstance(config.preconditioning, LogSigmaPreconditioning):
        given |= _changes(found.preconditioning, config.preconditioning, "sigma_data")
    given |= _changes(found, config, "num_levels", "class_names")
    given |= {"tuned_timesteps": config.tuned_timesteps[:1]} if config.tuned_timesteps else {}
    found = CheckpointHints(**given).apply(dataclasses.replace(found, num_levels=config.num_levels))
    kept = ("tuned_timesteps", "tuned_sigmas", "clip_denoised", "latents", "label_dropout", "guidance_range")
    kept = (*kept, "default_sampler", "default_steps")
    return Unstated(given, tuple(_changes(found, config, *kept)))


def _changes(old: Any, new: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(new, name) for name in names if getattr(old, name) != getattr(new, name)}


def _word(name: str, value: Any) -> str:
    if name == "class_names":
        return "FILE"
    numbers = value[0] if name == "tuned_timesteps" else value
    return ",".join(map(str, numbers)) if isinstance(numbers, tuple) else str(numbers)
