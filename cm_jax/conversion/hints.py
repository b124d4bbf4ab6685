"""Settings of a checkpoint that its tensors do not determine, given by the user."""

import dataclasses
from typing import Any, Literal

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError, check_int
from cm_jax.networks.fir import Filter

PreconditioningName = Literal["consistency", "edm"]
PRECONDITIONING = {"consistency": ConsistencyPreconditioning, "edm": EDMPreconditioning}


@dataclasses.dataclass(frozen=True)
class CheckpointHints:
    """Settings that tensors do not determine. None: taken from the checkpoint's config or its published name."""

    head_dim: int | None = None
    heads: int | None = None
    preconditioning: PreconditioningName | None = None
    num_levels: int | None = None
    image_size: int | None = None
    attention_factors: tuple[int, ...] | None = None
    """For jcm checkpoints whose levels have equal widths: downsampling factors with attention."""
    resampling: Filter | None = None
    """For jcm checkpoints without an input pyramid."""

    def __post_init__(self) -> None:
        limits = {"head_dim": (1, 4096), "heads": (1, 4096), "num_levels": (2, 2**20), "image_size": (1, 2**13)}
        for name, (least, most) in limits.items():
            if getattr(self, name) is not None:
                check_int(f"--{name.replace('_', '-')}", getattr(self, name), least, most)

    def override(self, config: ModelConfig, path: Any) -> ModelConfig:
        """The config of a native checkpoint with these settings. Raises InputError for other heads than it has."""
        network, preconditioning, num_levels = config.network, config.preconditioning, config.num_levels
        if self.head_dim or self.heads:
            network = dataclasses.replace(config.adm, head_dim=self.head_dim, heads=self.heads)
            if network != config.adm:
                raise InputError(
                    f"Expected head_dim {config.adm.head_dim} and heads {config.adm.heads}, as {path} has; got "
                    f"{self.head_dim} and {self.heads}. Leave out --head-dim and --heads."
                )
        if self.image_size:
            network = dataclasses.replace(network, image_size=self.image_size)  # type: ignore[type-var]
        if self.num_levels:
            num_levels = self.num_levels
        if self.preconditioning:
            current = config.log_sigma_preconditioning
            shared = {"sigma_data": current.sigma_data, "time_factor": current.time_factor}
            preconditioning = PRECONDITIONING[self.preconditioning](**shared)
        same = num_levels == config.num_levels and preconditioning == config.preconditioning
        return dataclasses.replace(
            config,
            network=network,
            preconditioning=preconditioning,
            num_levels=num_levels,
            tuned_timesteps=config.tuned_timesteps if same else (),
            consistency=None if self.preconditioning else config.consistency,
        )
