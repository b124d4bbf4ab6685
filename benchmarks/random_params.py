"""Random parameters for networks without trained weights."""

from typing import Any

import jax
import numpy as np

from cm_jax.networks import AnyNetwork
from cm_jax.types import Params


def random_params(network: AnyNetwork, seed: int = 0) -> Params:
    """Seeded float32 parameters: variance-preserving kernels, scales near 1, no layer at zero."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        match path[-1].key:
            case "kernel":
                return values / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
            case "scale":
                return 1 + values / 10
            case "bias":
                return values / 10
            case _:
                return values

    return jax.tree_util.tree_map_with_path(fill, network.shapes())
