"""The EMAs in a training run's checkpoints, by name, and its parameters without EMA.

The training state next to the weights for sampling holds all EMAs; only the arrays of the chosen one are read.
"""

from pathlib import Path
from typing import NamedTuple

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.state_archive import STATE, StateArchive
from cm_jax.errors import InputError, indented_list, nearest, shape_complaints
from cm_jax.types import Params, leaves, nested

NONE = "none"
"""Stands for the parameters without EMA."""


class EMAName(NamedTuple):
    """An EMA as users name it: 0.9999, power_0.1, or none."""

    kind: str
    """exponential, power or none."""
    value: float = 0.0
    """Decay or relative width."""

    @classmethod
    def parse(cls, text: str) -> "EMAName | None":
        """The name in a text: 0.9999, exponential_0.9999, power_0.1, none or parameters; None for any other."""
        word = text.strip().lower()
        if word in (NONE, "parameters"):
            return cls(NONE)
        kind, _, number = word.rpartition("_")
        try:
            return cls(kind or "exponential", float(number)) if kind in ("", "exponential", "power") else None
        except ValueError:
            return None

    def __str__(self) -> str:
        return NONE if self.kind == NONE else f"power_{self.value!r}" if self.kind == "power" else repr(self.value)


def read_ema(checkpoint: Path, ema: str | float) -> tuple[ModelConfig, Params, str]:
    """(config, NumPy parameters, a line for the user) of an EMA in a checkpoint of a run.

    ema: a decay (0.9999), power_WIDTH for a power-function EMA, or "none" for the parameters without EMA. Raises
    InputError for an unknown EMA, with those of the run, and for a checkpoint without a training state.
    """
    file = checkpoint / "config.json"
    config = ModelConfig.from_json(file.read_text("utf-8", "replace"), str(file))
    if not (checkpoint / STATE).is_file():
        raise InputError(
            f"{checkpoint} has one set of weights, because it has no training state of a run ({STATE}): leave out "
            f"--ema {ema}."
        )
    with StateArchive(checkpoint / STATE) as archive:
        places = emas(archive)
        name = EMAName.parse(str(ema))
        place = None if name is None else places.get(name)
        if place is None:
            names = list(map(str, places))
            expected = f"Expected one of {', '.join(names)}, got {str(ema)!r}"
            raise InputError(f"{checkpoint} has no such EMA. {expected}.{nearest(str(ema), names)}")
        params = read_params(archive, place, config)
    used = "parameters without EMA" if name == EMAName(NONE) else f"EMA {name}"
    return config, params, f"Weights: {used}, of {', '.join(map(str, places))}."


def emas(archive: StateArchive) -> dict[EMAName, str]:
    """All EMAs in a training state, with the beginning of the names of their arrays."""
    found = dict.fromkeys(name.split("/")[1] for name in archive.leaves if name.startswith("ema/"))
    named = {name: f"ema/{each}/" for each in found if (name := EMAName.parse(each))}
    return named | ({EMAName(NONE): "params/"} if any(name.startswith("params/") for name in archive.leaves) else {})


def read_params(archive: StateArchive, place: str, config: ModelConfig) -> Params:
    """The parameters of the network that are stored under `place`. Raises InputError if they do not fit the config."""
    expected = {name: tuple(leaf.shape) for name, leaf in leaves(config.network.shapes())}
    found = {name: archive.leaves[place + name].shape for name in expected if place + name in archive.leaves}
    if complaints := shape_complaints(expected, found):
        raise InputError(f"{place} in {archive.file} contradicts the config:\n  {indented_list(complaints)}")
    return nested({name: archive.read(place + name) for name in expected})
