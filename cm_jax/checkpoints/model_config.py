"""What a model is, apart from its parameters: the JSON that lies beside them in a checkpoint."""

import dataclasses
import itertools

from cm_jax.checkpoints import serialization
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    LogSigmaPreconditioning,
    MeanFlowPreconditioning,
    Preconditioning,
    TrigFlowPreconditioning,
)
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, SongUNet

FORMAT = 1
"""Version of the checkpoint format; a newer one is refused with the advice to upgrade."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network, its scalings, the levels it was trained on, and what is known of its classes and best levels."""

    network: ADMUNet | SongUNet
    preconditioning: Preconditioning
    grid: KarrasGrid
    class_names: tuple[str, ...] = ()
    """Name of class 0, 1, ...; empty where there are no classes or no names."""
    tuned_timesteps: tuple[tuple[int, ...], ...] = ()
    """Descending grid indices known to work well, as diffusers writes them: ((22, 0),) for two steps."""
    consistency: bool | None = None
    """Whether it is a consistency function. None: where its scalings are those of one. ECT and sCM make consistency
    functions with the scalings of a denoiser."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "tuned_timesteps", tuple(map(tuple, self.tuned_timesteps)))
        if self.class_names and len(self.class_names) != self.network.classes:
            raise InputError(f"{len(self.class_names)} class names for {self.network.classes} classes.")
        for steps in self.tuned_timesteps:
            if any(a <= b for a, b in itertools.pairwise((self.grid.levels, *steps))) or steps[-1:] != (0,):
                raise InputError(
                    f"Tuned timesteps must fall from below {self.grid.levels}, the number of levels, to 0; got {steps}."
                )

    @property
    def function(self) -> ConsistencyFunction:
        return ConsistencyFunction(self.network, self.preconditioning)

    @property
    def adm(self) -> ADMUNet:
        """The network, where it is an ADM U-Net: the only kind that PyTorch's formats hold. InputError elsewhere."""
        if not isinstance(self.network, ADMUNet):
            raise InputError(f"PyTorch's formats hold ADM U-Nets, and this is a {type(self.network).__name__}.")
        return self.network

    @property
    def log_sigma_preconditioning(self) -> LogSigmaPreconditioning:
        """The scalings, where their clock is ln sigma: all that others' formats hold. InputError elsewhere."""
        if not isinstance(self.preconditioning, LogSigmaPreconditioning) or isinstance(
            self.preconditioning, TrigFlowPreconditioning
        ):
            raise InputError(
                f"Others' formats hold networks whose clock is ln sigma, and this one has "
                f"{type(self.preconditioning).__name__}: keep it as ours."
            )
        return self.preconditioning

    @property
    def distilled(self) -> bool:
        """Whether it is a consistency function (which may be called once), and not a denoiser D."""
        if self.consistency is not None:
            return self.consistency
        return isinstance(self.preconditioning, ConsistencyPreconditioning | MeanFlowPreconditioning)

    def to_json(self) -> str:
        return serialization.to_text(self, FORMAT)

    @classmethod
    def from_json(cls, text: str, source: str) -> "ModelConfig":
        """The inverse of `to_json`; `source` names the file in the InputError that a bad one raises."""
        return serialization.from_text(text, cls, FORMAT, source, "the config of a cm_jax checkpoint")
