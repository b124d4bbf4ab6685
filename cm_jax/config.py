"""What a model is, apart from its parameters: the JSON that lies beside them in a checkpoint."""

import dataclasses
import itertools
import json
import typing
from typing import Any

from cm_jax.checked import checked
from cm_jax.consistency_function import ConsistencyFunction
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, Network, SongUNet
from cm_jax.noise_levels import KarrasGrid
from cm_jax.preconditioning import (
    BoundaryScaling,
    EDMScaling,
    FlowScaling,
    Scaling,
    TrigFlowScaling,
    VarianceScaling,
)

FORMAT = 1
"""Version of the checkpoint format; a newer one is refused with the advice to upgrade."""

_PARTS: dict[str, tuple[type, ...]] = {
    "network": (ADMUNet, SongUNet),
    "scaling": (BoundaryScaling, EDMScaling, TrigFlowScaling, FlowScaling),
    "grid": (KarrasGrid,),
}
"""The fields of a config that are objects, and what they may be."""


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
        return ConsistencyFunction(self.network, self.scaling)

    @property
    def adm(self) -> ADMUNet:
        """The network, where it is an ADM U-Net: the only kind that PyTorch's formats hold. InputError elsewhere."""
        if not isinstance(self.network, ADMUNet):
            raise InputError(f"PyTorch's formats hold ADM U-Nets, and this is a {type(self.network).__name__}.")
        return self.network

    @property
    def log_scaling(self) -> VarianceScaling:
        """The scalings, where their clock is ln sigma: all that others' formats hold. InputError elsewhere."""
        if not isinstance(self.scaling, VarianceScaling) or isinstance(self.scaling, TrigFlowScaling):
            raise InputError(
                f"Others' formats hold networks whose clock is ln sigma, and this one has "
                f"{type(self.scaling).__name__}: keep it as ours."
            )
        return self.scaling

    @property
    def distilled(self) -> bool:
        """Whether it is a consistency function (which may be called once), and not a denoiser D."""
        if self.consistency is not None:
            return self.consistency
        return isinstance(self.scaling, BoundaryScaling | FlowScaling)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **_encode(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> "ModelConfig":
        """The inverse of `to_json`; `source` names the file in the InputError that a bad one raises."""
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or "format" not in fields:
                raise ValueError("it has no format")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not the config of a cm_jax checkpoint: {error}.") from error
        version = fields.pop("format")
        if version != FORMAT or not isinstance(version, int):
            newer = isinstance(version, int) and version > FORMAT
            advice = "upgrade cm_jax" if newer else "it is damaged, or of another program"
            raise InputError(f"{source} has format {version!r}; this version reads format {FORMAT}: {advice}.")
        try:
            parts = {name: _decode(fields.pop(name, None), kinds, name) for name, kinds in _PARTS.items()}
            return _built(cls, fields, "the config", parts)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {} if isinstance(value, ModelConfig) else {"kind": type(value).__name__}
        return kind | {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _decode(value: Any, kinds: tuple[type, ...], place: str) -> Any:
    """A dataclass of one of `kinds`, from the object that `_encode` made of it."""
    named = {kind.__name__: kind for kind in kinds}
    fields = dict(value) if isinstance(value, dict) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in named:
        raise InputError(f"{place} must be an object whose kind is {' or '.join(named)}.")
    return _built(named[kind], fields, place)


def _built(kind: type, fields: dict[str, Any], place: str, known: dict[str, Any] | None = None) -> Any:
    """kind(**fields, **known), every field checked against its type."""
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)} - set(known or {})
    unknown = sorted(set(fields) - names)
    if unknown:
        raise InputError(f"{place} has no field {unknown[0]!r}: its fields are {', '.join(sorted(names))}.")
    values = {name: checked(value, hints[name], f"{place}.{name}") for name, value in fields.items()}
    return kind(**values, **(known or {}))
