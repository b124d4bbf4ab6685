"""Parameters as dictionaries of other programs: Flax variables, flat names, and PyTorch's state dicts."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.edm_writing import write_state_dict
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.unet_format import DIFFUSERS, OPENAI
from cm_jax.errors import InputError, indented_list, one_line, shape_complaints
from cm_jax.types import Network, Params, leaves, nested


def params_from_flax(network: Network, variables: Mapping[Any, Any]) -> Params:
    """The parameters of `network` for `Model(config, params)` from a dictionary of arrays.

    variables: {"params": ...} as Flax has them, or parameters alone; nested, or flat with names "a/b", "a.b" or
    ("a", "b"); arrays of NumPy or JAX. `model.params` is such a dictionary, which Flax accepts, too. Raises InputError
    that lists all missing, unexpected and wrong arrays.
    """
    if not isinstance(variables, Mapping):
        raise InputError(f"Expected a dictionary of parameters, got {one_line(variables)}.")
    tree = variables["params"] if set(variables) == {"params"} else variables
    found = {"/".join(path): np.asarray(leaf) for path, leaf in _flat(tree)}
    expected = {name: leaf.shape for name, leaf in leaves(network.shapes())}
    complaints = shape_complaints(expected, {name: array.shape for name, array in found.items()})
    complaints += [
        f"not finite floating-point numbers: {name}"
        for name, array in found.items()
        if not (jnp.issubdtype(array.dtype, jnp.floating) and np.isfinite(array).all())
    ]
    if complaints:
        raise InputError(
            f"The dictionary does not hold the parameters of the {type(network).__name__}: {len(complaints)} "
            f"disagree.\n  {indented_list(complaints)}"
        )
    return network.prepare(nested({name: found[name] for name in expected}))


def state_dict(kind: str, config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The parameters by their names in a format: "native" (paths, "a/b/c"), "openai", "diffusers" or "edm".

    Convolutions and matrices are in PyTorch's layout, but for native. Raises InputError for another format, and for a
    network that the format does not have.
    """
    if kind == "native":
        return {name: np.asarray(leaf) for name, leaf in leaves(params)}
    if kind == "edm":
        return write_state_dict(config, params)
    if kind not in ("openai", "diffusers"):
        raise InputError(f"Expected the format native, openai, diffusers or edm, got {one_line(kind)}.")
    return to_source((OPENAI if kind == "openai" else DIFFUSERS).rules(config.adm), params)


def _flat(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, branch in tree.items():
        names = key if isinstance(key, tuple) else str(key).replace(".", "/").split("/")
        yield from _flat(branch, (*path, *map(str, names)))
