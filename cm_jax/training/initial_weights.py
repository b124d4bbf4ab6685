"""Initial weights of a run from a checkpoint, also of other classes, without classes, or of another image size."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.class_rows import Names, class_rows
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import Source
from cm_jax.errors import InputError, indented_list
from cm_jax.networks import AnyNetwork, BuiltInNetwork, EDM2UNet, SongUNet
from cm_jax.training.config import TrainConfig
from cm_jax.types import Params

RUNTIME_FIELDS = ("dropout", "dropout_size", "precision", "attention", "rematerialize")
"""Fields of a network that do not change the meaning of its parameters."""
_DATA_FIELDS = ("classes", "image_size", "label_embedding")
"""Fields that may differ from those of the checkpoint in --init-from."""
_LABEL_BRANCHES = ("table", "label")
"""Parameters of the embedding that depend on the classes."""


def with_fields(network: AnyNetwork, given: AnyNetwork, fields: Sequence[str] = ()) -> AnyNetwork:
    """`network` with the runtime fields and `fields` of `given`. A new guidance embedding starts at zero."""
    shared = serialization.hints(type(network)).keys() & serialization.hints(type(given)).keys()
    lacking = [name for name in fields if name not in shared]
    if lacking:
        kinds = type(network).__name__, type(given).__name__
        raise InputError(f"The inherited network is a {kinds[0]}, and {', '.join(lacking)} are fields of a {kinds[1]}.")
    kept = {name: getattr(given, name) for name in (*RUNTIME_FIELDS, *fields) if name in shared}
    if given.guidance_embedding and "guidance_embedding" in shared:
        kept["guidance_embedding"] = True
    return dataclasses.replace(network, **kept)  # type: ignore[type-var]


def check_initial_weights(config: TrainConfig, source: Source) -> None:
    """Raise InputError if the student cannot be initialized from a checkpoint.

    Classes and image size may be others than those of --init-from, but must be those of a teacher.
    """
    found, expected = with_fields(source.config.network, config.network), config.network
    if isinstance(found, SongUNet) and isinstance(expected, SongUNet):  # a setting of the random weights alone
        found = dataclasses.replace(found, fourier_scale=expected.fourier_scale)
    old, new = serialization.encode(found), serialization.encode(expected)
    free = _DATA_FIELDS if config.init_from else ()
    old |= {name: new[name] for name in free if name in old and name in new}
    complaints = serialization.differences(old, new, there="in the checkpoint")
    sigma, theirs, ours = jnp.full(1, 2.0), source.config.preconditioning, config.preconditioning
    if float(theirs.c_noise(sigma)[0]) != float(ours.c_noise(sigma)[0]):
        complaints.append(f"c_noise(sigma): that of {theirs} in the checkpoint, that of {ours} now")
    if complaints:
        raise InputError(
            f"The network in {source.path} differs from this run's:\n  {indented_list(complaints)}\n"
            "Take its network with --inherit-network and give --preconditioning its values, or use --init-from fresh."
        )


def transfer_notes(source: Source, network: AnyNetwork, class_names: Names) -> list[str]:
    """What differs between the data of a checkpoint and those of the run, for the user."""
    old, notes = source.config.network, []
    if old.image_shape != network.image_shape:
        sizes = ("x".join(map(str, each.image_shape[:2])) for each in (old, network))
        notes.append("The network was trained on images of {} pixels and is trained on {} now.".format(*sizes))
    rows = _rows(source.config, network, class_names)
    if network.classes is None and old.classes is not None:
        notes.append(f"The embedding of {old.classes} classes is dropped: the network is unconditional.")
    elif network.classes is not None and old.classes is None:
        start = "at random" if isinstance(network, EDM2UNet) else "at zero, as the unconditional network"
        notes.append(f"The network was unconditional: an embedding of {network.classes} classes starts {start}.")
    elif rows != list(range(old.classes or 0)):
        kept = [class_names[number] for number, row in enumerate(rows) if row is not None]
        shown = f" ({', '.join(kept[:5])}{', ...' if len(kept) > 5 else ''})" if kept else ""
        notes.append(
            f"Of the embeddings of {network.classes} classes, {len(kept)} are those of {source.path}{shown}, found by "
            f"name, and {len(rows) - len(kept)} start at random; the checkpoint has {old.classes} classes."
        )
    return notes


def initial_params(source: Source, network: AnyNetwork, class_names: Names, key: Key[Array, ""]) -> Params:
    """The parameters of a checkpoint in float32, for a network that `check_initial_weights` accepts.

    class_names: of the run's data. key: for embeddings of new classes. A network that becomes conditional first equals
    the unconditional one; an unconditional network equals the conditional one without labels. EDM2 networks have no
    zero embedding, so that neither holds for them.
    """
    params: Params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), source.params)
    if network.guidance_embedding and not source.config.network.guidance_embedding:
        added = network.shapes()["guidance"]
        params |= {"guidance": jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), added)}
    if not isinstance(network, BuiltInNetwork):
        return params
    return params | {"embedding": _embedding(params["embedding"], source.config, network, class_names, key)}


def _embedding(
    embedding: Params, source: ModelConfig, network: AnyNetwork, class_names: Names, key: Key[Array, ""]
) -> Params:
    """The embedding of c_noise and labels, for the classes of `network`."""
    old, rows = source.network, _rows(source, network, class_names)
    former = {name: branch for name, branch in embedding.items() if name in _LABEL_BRANCHES}
    rest = {name: branch for name, branch in embedding.items() if name not in _LABEL_BRANCHES}
    branch = next((name for name in _LABEL_BRANCHES if name in network.shapes()["embedding"]), "")
    if rows == list(range(old.classes or 0)) and list(former) == [branch] * bool(branch):
        return embedding
    known, bias = _class_vectors(former, old)
    if not branch:
        if bias is None:
            return rest
        dense = rest["dense_1"]  # the next layer, into which the embedding's bias goes
        return rest | {"dense_1": dense | {"bias": dense["bias"] + bias @ dense["kernel"]}}
    fresh, _ = _class_vectors({branch: network.initialize(key)["embedding"][branch]}, network)
    if old.classes is None:
        vectors = fresh if isinstance(network, EDM2UNet) else np.zeros_like(fresh)
    else:
        if isinstance(network, EDM2UNet):  # in the magnitude of the others: the kernel is normalized over all classes
            fresh = fresh * np.sqrt(np.square(known).mean(0))
        vectors = np.stack([fresh[i] if row is None else known[row] for i, row in enumerate(rows)])
    return rest | {branch: _branch(vectors, bias, network)}


def _class_vectors(branches: Params, network: AnyNetwork) -> tuple[np.ndarray, np.ndarray | None]:
    """(what each class adds to the features [k, w], without the bias, the bias of a linear label embedding)."""
    if "table" in branches:
        return np.asarray(branches["table"]), None
    if "label" not in branches:
        return np.zeros((0, 0), np.float32), None
    kernel = np.asarray(branches["label"]["kernel"])
    if isinstance(network, EDM2UNet):
        return kernel, None
    return kernel * np.float32(np.sqrt(len(kernel))), np.asarray(branches["label"]["bias"])


def _branch(vectors: np.ndarray, bias: np.ndarray | None, network: AnyNetwork) -> Any:
    """The inverse of `_class_vectors` for a network; a table contains the bias."""
    if isinstance(network, EDM2UNet):
        return {"kernel": vectors}
    bias = np.zeros(vectors.shape[1], np.float32) if bias is None else bias
    if isinstance(network, SongUNet) and network.label_embedding == "linear":
        return {"kernel": vectors / np.float32(np.sqrt(len(vectors))), "bias": bias}
    return vectors + bias


def _rows(source: ModelConfig, network: AnyNetwork, class_names: Names) -> list[int | None]:
    """For each class, the class of the checkpoint that it is: by name, or by number if either has no names."""
    classes, before = network.classes or 0, source.network.classes or 0
    if class_names and source.class_names:
        return class_rows(class_names, source.class_names)
    return list(range(classes)) if classes == before else [None] * classes
