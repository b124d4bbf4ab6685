"""Arguments of the Python API as users give them, lists or arrays of NumPy, JAX and others: conversion and checks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from cm_jax.errors import InputError, check_int, one_line

Seed = int | Key[Array, ""]
"""A seed in [0, 2^32 - 1], or a JAX key."""
Seeds = Sequence[Seed] | Int[Array | np.ndarray, " n"] | Key[Array, " n"]


def as_key(seed: Any) -> Key[Array, ""]:
    """The key of a seed, or the key itself. Raises InputError for several keys and for other types."""
    if not isinstance(seed, jax.Array) or (jnp.issubdtype(seed.dtype, jnp.integer) and not seed.ndim):
        return jax.random.key(check_int("A seed", seed, 0, 2**32 - 1))
    key = _typed(seed)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise InputError(f"Expected one seed or one key, got {seed.dtype} {list(seed.shape)}; call once for each key.")
    return key


def as_keys(key: Any, count: Any, seeds: Any) -> tuple[Key[Array, "*n"], int]:
    """The key of `count` images and `count`; or the keys of several seeds, one for each image, and their number.

    Raises InputError for both a key and seeds, and for neither.
    """
    count = check_int("count", count, 1, 10**9)
    if (key is None) == (seeds is None) or (seeds is not None and count != 1):
        raise InputError("Give either a key and a count, as in sample(0, 4), or seeds, as in sample(seeds=[3, 8]).")
    if seeds is None:
        return as_key(key), count
    listed = list(seeds) if isinstance(seeds, jax.Array) and seeds.ndim else as_list(seeds)
    if not listed:
        raise InputError(f"Expected a list of seeds, as in seeds=[3, 8]; got {one_line(seeds)}.")
    return jnp.stack([as_key(each) for each in listed]), len(listed)


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


def as_pair(first: Any, second: Any) -> Float[np.ndarray, "2 ..."]:
    """Two images as one array. Raises InputError unless they have the same shape."""
    pair = [np.asarray(as_images(image)) for image in (first, second)]
    if pair[0].shape != pair[1].shape:
        raise InputError(
            f"Expected two images of the same shape, got {' and '.join(str(list(p.shape)) for p in pair)}."
        )
    return np.stack(pair)


def as_list(values: Any) -> list[Any] | None:
    """The elements of a sequence or of an array [n]; None for anything else."""
    if isinstance(values, list | tuple | range):
        return list(values)
    try:
        array = np.asarray(values) if hasattr(values, "__array__") else np.zeros(())
    except (TypeError, ValueError, RuntimeError):
        return None
    return [*np.atleast_1d(array).tolist()] if array.ndim == 1 else None
