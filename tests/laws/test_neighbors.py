"""Nearest training images: against direct search, for both distances."""

import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.errors import InputError
from cm_jax.evaluation import nearest, neighbors
from cm_jax.feature_networks.lpips import LPIPS
from tests.laws.test_lpips import narrow  # noqa: F401

RNG = np.random.default_rng(0)
REFERENCES = RNG.integers(0, 256, (150, 16, 24, 3), dtype=np.uint8)
IMAGES = RNG.integers(0, 256, (70, 16, 24, 3), dtype=np.uint8)


def test_an_image_of_the_set_is_its_own_neighbor(narrow):  # noqa: F811
    chosen = [149, 3, 70]
    for weights, error in ((None, 0), (narrow, 1e-5)):
        found = nearest(REFERENCES[chosen], REFERENCES, weights)
        assert found.indices.tolist() == chosen
        np.testing.assert_allclose(found.distances, 0, atol=error)


def test_pixel_distance_is_that_of_a_direct_search(monkeypatch):
    monkeypatch.setattr(neighbors, "_LARGE", 32)
    found = nearest(IMAGES, REFERENCES)
    every = np.sqrt(((IMAGES[:, None].astype(float) - REFERENCES) ** 2).mean((2, 3, 4)))
    np.testing.assert_array_equal(found.indices, every.argmin(1))
    np.testing.assert_allclose(found.distances, every.min(1), rtol=1e-9)


def test_perceptual_distance_is_lpips(narrow):  # noqa: F811
    metric = LPIPS("max", 0).with_weights(narrow)
    found = nearest(IMAGES[:3], REFERENCES[:66], narrow)
    x, y = (jnp.float32(images) / 127.5 - 1 for images in (IMAGES[:3], REFERENCES[:66]))
    every = np.stack([metric(jnp.broadcast_to(one, y.shape), y) for one in x])
    np.testing.assert_array_equal(found.indices, every.argmin(1))
    np.testing.assert_allclose(found.distances, every.min(1), rtol=1e-5)


@pytest.mark.parametrize("references", [REFERENCES[:, :8], REFERENCES[:0], REFERENCES[..., :1]])
def test_other_sizes_are_refused(references):
    with pytest.raises(InputError, match="Expected images and references of one size"):
        nearest(IMAGES, references)


def test_no_images_are_refused():
    with pytest.raises(InputError, match="at least one of each, got \\[0, 16, 24, 3\\]"):
        nearest(IMAGES[:0], REFERENCES)
