"""Settings of a checkpoint that its tensors do not determine, as given by the user."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.attention_order import QKVOrder
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError, check_int
from cm_jax.networks.layers import Filter
from cm_jax.types import ImageSize

PreconditioningName = Literal["consistency", "edm", "edm-consistency"]
PRECONDITIONING = {
    "consistency": ConsistencyPreconditioning,
    "edm": EDMPreconditioning,
    "edm-consistency": EDMPreconditioning,
}

Tuned = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class CheckpointHints:
    """Settings that tensors do not determine. None: taken from the checkpoint's config or its published name.

    Raises InputError for numbers out of range.
    """

    head_dim: int | None = None
    heads: int | None = None
    preconditioning: PreconditioningName | None = None
    num_levels: int | None = None
    image_size: ImageSize | None = None
    attention_factors: tuple[int, ...] | None = None
    """For consistency_models_cifar10 if levels have equal widths: downsampling factors with attention."""
    resampling: Filter | None = None
    """For consistency_models_cifar10 without an input pyramid."""
    key: str | None = None
    """For files with several networks: the name of the one to read."""
    ema: str | None = None
    """For checkpoints of training runs: the EMA to read (0.9999, power_0.1), or "none" for the parameters without."""
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    sigma_data: float | None = None
    time_factor: float | None = None
    """c_noise / ln sigma."""
    class_names: tuple[str, ...] | None = None
    tuned_timesteps: tuple[tuple[int, ...], ...] | None = None
    """As in ModelConfig."""
    qkv_order: QKVOrder | None = None
    """For the names of OpenAI's code: see attention_order.py."""

    def __post_init__(self) -> None:
        limits = {"head_dim": (1, 4096), "heads": (1, 4096), "num_levels": (2, 2**20), "image_size": (1, 2**13)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None:
                    check_int(f"--{name.replace('_', '-')}", number, least, most)

    def override(self, config: ModelConfig, path: Any) -> ModelConfig:
        """The config of a native checkpoint with these settings. Raises InputError for other heads than it has."""
        network, preconditioning = config.network, config.preconditioning
        num_levels = self.num_levels or config.num_levels
        if self.head_dim or self.heads:
            network = dataclasses.replace(config.adm, head_dim=self.head_dim, heads=self.heads)
            if network != config.adm:
                raise InputError(
                    f"Expected head_dim {config.adm.head_dim} and heads {config.adm.heads}, as {path} has; got "
                    f"{self.head_dim} and {self.heads}. Leave out --head-dim and --heads."
                )
        if self.image_size:
            network = dataclasses.replace(network, image_size=self.image_size)  # type: ignore[type-var]
        if self.preconditioning:
            current = config.log_sigma_preconditioning
            kind = PRECONDITIONING[self.preconditioning]
            preconditioning = kind(sigma_data=current.sigma_data, time_factor=current.time_factor)
        same = num_levels == config.num_levels and preconditioning == config.preconditioning
        replaced = dataclasses.replace(
            config,
            network=network,
            preconditioning=preconditioning,
            num_levels=num_levels,
            tuned_timesteps=config.tuned_timesteps if same else (),
            tuned_sigmas=config.tuned_sigmas if preconditioning == config.preconditioning else (),
            consistency=is_consistency(self.preconditioning) if self.preconditioning else config.consistency,
        )
        return self.apply(replaced)

    def apply(self, config: ModelConfig) -> ModelConfig:
        """A config with the settings that no tensors determine: noise range, sigma_data, time factor, names, timesteps.

        Tuned noise levels that do not fit the noise range are dropped, and tuned sigmas for as many steps as given
        timesteps. Raises InputError for values out of range, and for a preconditioning without such a setting.
        """
        schedule = dataclasses.replace(config.schedule, **self._given("sigma_min", "sigma_max", "rho"))
        changes, preconditioning = self._given("sigma_data", "time_factor"), config.preconditioning
        for name in changes.keys() - serialization.hints(type(preconditioning)).keys():
            kind = type(preconditioning).__name__
            raise InputError(f"{kind} has no {name}; leave out --{name.replace('_', '-')}.")
        changed = {"schedule": schedule, "preconditioning": dataclasses.replace(preconditioning, **changes)}  # type: ignore[type-var]
        changed |= self._given("class_names", "tuned_timesteps")
        timesteps = changed.setdefault("tuned_timesteps", config.tuned_timesteps if schedule == config.schedule else ())
        sigmas = config.tuned_sigmas if schedule.sigma_max == config.schedule.sigma_max else ()
        sigmas = tuple(levels for levels in sigmas if levels[-1] >= schedule.sigma_min)
        return dataclasses.replace(config, **changed, tuned_sigmas=of_other_steps(sigmas, timesteps))

    def without_key(self, path: Path) -> None:
        """Raise InputError if there is a key, for a checkpoint with one network."""
        if self.key is not None:
            raise InputError(f"{path} holds one network without a key; leave out --key {self.key}.")

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def of_other_steps(tuned: Tuned, other: Tuned) -> Tuned:
    """The tuned noise levels for numbers of steps for which `other` has none."""
    return tuple(levels for levels in tuned if len(levels) not in set(map(len, other)))


def is_consistency(name: PreconditioningName) -> bool | None:
    """`ModelConfig.consistency` of a model with this preconditioning."""
    return True if name == "edm-consistency" else None
