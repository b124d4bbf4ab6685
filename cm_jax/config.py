"""What a model is, apart from its parameters: the JSON that lies beside them in a checkpoint."""

import dataclasses
import json
from typing import Any

from cm_jax.consistency_function import ConsistencyFunction
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, Network, SongUNet
from cm_jax.noise_levels import KarrasGrid
from cm_jax.preconditioning import BoundaryScaling, EDMScaling, Scaling, TrigFlowScaling

FORMAT = 1
"""Version of the checkpoint format; a newer one is refused with the advice to upgrade."""

_KINDS = {kind.__name__: kind for kind in (ADMUNet, SongUNet, BoundaryScaling, EDMScaling, KarrasGrid, TrigFlowScaling)}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network, its scalings, the levels it was trained on, and what is known of its classes and best levels."""

    network: Network
    scaling: Scaling
    grid: KarrasGrid
    class_names: tuple[str, ...] = ()
    """Name of class 0, 1, ...; empty where there are no classes or no names."""
    tuned_timesteps: tuple[tuple[int, ...], ...] = ()
    """Descending grid indices known to work well, as diffusers writes them: ((22, 0),) for two steps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "tuned_timesteps", tuple(map(tuple, self.tuned_timesteps)))
        if self.class_names and len(self.class_names) != self.network.classes:
            raise InputError(f"{len(self.class_names)} class names for {self.network.classes} classes.")

    @property
    def function(self) -> ConsistencyFunction:
        return ConsistencyFunction(self.network, self.scaling)

    @property
    def adm(self) -> ADMUNet:
        """The network, where it is an ADM U-Net: the only kind that PyTorch's formats hold. InputError elsewhere."""
        if not isinstance(self.network, ADMUNet):
            raise InputError(f"PyTorch's formats hold ADM U-Nets, and this is a {type(self.network).__name__}.")
        return self.network

    @property
    def distilled(self) -> bool:
        """Whether it is a consistency function (which may be called once), and not a denoiser D."""
        return isinstance(self.scaling, BoundaryScaling)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **_encode(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> "ModelConfig":
        """The inverse of `to_json`; `source` names the file in the InputError that a bad one raises."""
        try:
            fields = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                raise InputError(
                    f"{source} has format {version}; this version of cm_jax reads format {FORMAT}: upgrade cm_jax."
                )
            return cls(**{name: _decode(value) for name, value in fields.items()})
        except InputError as error:
            raise InputError(str(error) if source in str(error) else f"{source}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{source} is not the config of a cm_jax checkpoint: {error!r}.") from error


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {"kind": type(value).__name__} if type(value).__name__ in _KINDS else {}
        return kind | {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {name: _decode(part) for name, part in value.items() if name != "kind"}
        return _KINDS[value["kind"]](**fields)
    return tuple(map(_decode, value)) if isinstance(value, list) else value
