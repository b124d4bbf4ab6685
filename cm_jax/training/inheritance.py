"""Network and data of a run, taken from the checkpoint that its weights come from."""

import dataclasses

from cm_jax.checkpoints import native, serialization
from cm_jax.checkpoints.published import resolve
from cm_jax.data import Dataset
from cm_jax.errors import InputError, indented_list
from cm_jax.networks import AnyNetwork, BuiltInNetwork
from cm_jax.training.config import TrainConfig
from cm_jax.training.initial_weights import with_fields
from cm_jax.training.run.history import read_config


def inherited_network(config: TrainConfig, found: AnyNetwork) -> tuple[TrainConfig, list[str]]:
    """The config with the network of the initial checkpoint, and what it changes.

    The fields in `network_fields` and those without effect on the parameters' meaning stay. Raises InputError.
    """
    network = with_fields(found, config.network, config.network_fields)
    encoded = serialization.encode(config.network), serialization.encode(network)
    changes = serialization.differences(*encoded, "network", there="in the preset")
    notes = [f"The network is that of {config.initial_checkpoint}:\n  {indented_list(changes)}"] if changes else []
    before, now = type(config.network).__name__, type(network).__name__
    if before != now:
        notes.append(
            f"The other settings of the preset, such as the learning rate, are those for {before}, and the network is "
            f"{now}: choose a preset with {now}, or check --optimizer.learning-rate.peak."
        )
    return dataclasses.replace(config, network=network), notes


def inherited_data(config: TrainConfig, stored: TrainConfig | None) -> tuple[TrainConfig, list[str]]:
    """The config with the data of the run (`stored`) or else of the run that the checkpoint is from, and notes.

    A checkpoint that is not in a run folder has no data. Raises InputError.
    """
    if stored is not None:
        return dataclasses.replace(config, data=stored.data), []
    found = _run_of(config.initial_checkpoint)
    if found is None or found.data == config.data:
        return config, []
    note = f"The data are those of {config.initial_checkpoint}. To use others, give --data."
    return dataclasses.replace(config, data=found.data), [note]


def with_classes_of(dataset: Dataset, config: TrainConfig) -> TrainConfig:
    """The config of an inherited conditional network with the classes of the data, unless they are given."""
    network = config.network
    if not isinstance(network, BuiltInNetwork) or network.classes is None or "classes" in config.network_fields:
        return config
    return dataclasses.replace(config, network=dataclasses.replace(network, classes=dataset.classes))


def _run_of(name: str) -> TrainConfig | None:
    """The settings of the run that a checkpoint RUN/checkpoints/00001000 is from; None for any other name."""
    try:
        checkpoint = resolve(name)
    except InputError:  # reported where the checkpoint is read
        return None
    folder = checkpoint.absolute().parent
    return read_config(folder.parent) if folder.name == "checkpoints" and native.is_checkpoint(checkpoint) else None
