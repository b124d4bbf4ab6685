"""The EMAs of a training run by name, and its parameters without EMA.

The training state next to the weights for sampling holds all EMAs; only the arrays of the chosen one are read.
"""

from pathlib import Path

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.post_hoc_ema import can_reconstruct, reconstruct
from cm_jax.checkpoints.state_archive import NONE, STATE, EMAName, StateArchive, emas, parameter_names
from cm_jax.errors import InputError, nearest
from cm_jax.types import Params, nested


def read_ema(checkpoint: Path, ema: str | float) -> tuple[ModelConfig, Params, tuple[str, ...]]:
    """(config, NumPy parameters, lines for the user) of an EMA in a checkpoint of a run.

    ema: a decay (0.9999), power_WIDTH for a power-function EMA, or "none" for the parameters without EMA. A
    power-function EMA that the run does not have is reconstructed from its snapshots. Raises InputError for an unknown
    EMA, with those of the run, and for a checkpoint without a training state.
    """
    if not (checkpoint / STATE).is_file():
        raise InputError(
            f"{checkpoint} has one set of weights, because it has no training state of a run ({STATE}): leave out "
            f"--ema {ema}."
        )
    name, config = EMAName.parse(str(ema)), native.read_config(checkpoint)
    with StateArchive(checkpoint / STATE) as archive:
        places = emas(archive)
        if name is not None and name in places:
            each = parameter_names(archive, places[name], config)
            params = nested({path: archive.read(places[name] + path) for path in each})
            used = "parameters without EMA" if name.kind == NONE else f"EMA {name}"
            return config, params, (f"Weights: {used}, of {', '.join(map(str, places))}.",)
    others = can_reconstruct(checkpoint)
    if others and name is not None and name.kind == "power":
        found = reconstruct(checkpoint, name.value)
        return found.config, found.params, found.notes
    names = list(map(str, places))
    further = ", or power_WIDTH of any width, reconstructed from snapshots" if others else ""
    expected = f"Expected one of {', '.join(names)}{further}; got {str(ema)!r}"
    raise InputError(f"{checkpoint} has no such EMA. {expected}.{nearest(str(ema), names)}")
