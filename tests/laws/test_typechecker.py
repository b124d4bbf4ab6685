"""The shapes of annotated arrays are checked in the tests, in functions, methods and dataclasses of the package."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cm_jax.diffusion.losses import PseudoHuber
from cm_jax.evaluation.metrics import Moments
from cm_jax.types import per_image


def test_arrays_of_other_shapes_and_types_are_found():
    assert per_image(jnp.ones(2)).shape == (2, 1, 1, 1)
    for wrong in (jnp.ones((2, 3)), jnp.ones(2, int), jax.random.key(0)):
        with pytest.raises(jaxtyping.TypeCheckError):
            per_image(wrong)


def test_fields_of_dataclasses_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        Moments(1, np.zeros(3), np.zeros((3, 2)))


def test_sizes_that_contradict_each_other_are_found():
    with pytest.raises(jaxtyping.TypeCheckError):
        PseudoHuber()(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 4, 4, 3)))
