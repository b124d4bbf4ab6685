"""Arguments of the Python API as users give them, lists or arrays of NumPy, JAX and others: conversion and checks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from cm_jax.errors import InputError, check_int, one_line

Seed = int | Key[Array, ""]
"""A seed in [0, 2^32 - 1], or a JAX key."""


def as_key(seed: Any) -> Key[Array, ""]:
    """The key of a seed, or the key itself. Raises InputError for several keys and for other types."""
    if not isinstance(seed, jax.Array) or (jnp.issubdtype(seed.dtype, jnp.integer) and not seed.ndim):
        return jax.random.key(check_int("A seed", seed, 0, 2**32 - 1))
    key = _typed(seed)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise InputError(f"Expected one seed or one key, got {seed.dtype} {list(seed.shape)}; call once for each key.")
    return key


def _typed(key: Array) -> Array:
    """A raw key, as jax.random.PRNGKey makes them, as a typed one; other arrays unchanged."""
    raw = key.dtype == jnp.uint32 and key.shape == jax.random.key_data(jax.random.key(0)).shape
    return jax.random.wrap_key_data(key) if raw else key


def is_traced(*values: Any) -> bool:
    """Whether an array among the values, or in a dictionary or list of arrays, is traced by jit, grad or vmap."""
    trees = [jax.tree.leaves(value) if isinstance(value, dict | list | tuple) else [value] for value in values]
    return any(isinstance(leaf, Tracer) for tree in trees for leaf in tree)


def as_array(name: str, values: Any) -> Array | np.ndarray:
    """`values` as an array of real numbers. Raises InputError for anything else; `name` begins the message."""
    try:
        array = values if isinstance(values, jax.Array) else np.asarray(values)
        if jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer):
            return array
    except (TypeError, ValueError, RuntimeError):  # ragged lists, sparse tensors
        pass
    raise InputError(f"{name} must be an array of numbers, got {one_line(values)}.")


def as_images(images: Any) -> Float[Array | np.ndarray, "..."]:
    """Images as an array of floats of any shape. Raises InputError for integers, which would not be in [-1, 1]."""
    array = as_array("images", images)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"Expected float32 images in [-1, 1], got {array.dtype}; use images / 127.5 - 1 for uint8.")
    if array.ndim and not len(array):
        raise InputError(f"Expected at least one image, got shape {list(array.shape)}.")
    return array


def as_list(values: Any) -> list[Any] | None:
    """The elements of a sequence or of an array [n]; None for anything else."""
    if isinstance(values, list | tuple | range):
        return list(values)
    try:
        array = np.asarray(values) if hasattr(values, "__array__") else np.zeros(())
    except (TypeError, ValueError, RuntimeError):
        return None
    return [*np.atleast_1d(array).tolist()] if array.ndim == 1 else None
