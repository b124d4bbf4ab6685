"""Numbers that torchmetrics publishes for its FID and KID, from its random images and the real weights."""

import os

import jax
import numpy as np
import pytest
import torch

from cm_jax.evaluation import Moments, frechet_distance, load_inception, squared_mmd, summarize
from cm_jax.feature_networks import inception, inception_v3

needs_weights = pytest.mark.skipif(
    not os.environ.get(inception.FILE.variable),
    reason=f"the real weights are no part of this repository: set {inception.FILE.variable} to the file that "
    "docs/conversion.md tells how to make",
)


@pytest.fixture(scope="module")
def images():
    """What its doctests draw after its network has drawn (and thrown away) initial weights from the same seed."""
    torch.manual_seed(123)
    torch.rand(23_816_528)
    low = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    high = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    return [np.ascontiguousarray(each.permute(0, 2, 3, 1).numpy()) for each in (low, high)]


@needs_weights
def test_fid_of_64_features(images):
    """12.7202 (torchmetrics, FrechetInceptionDistance)."""
    params = inception.load()
    see = jax.jit(lambda images: inception.features(params, images).first)
    seen = [np.concatenate([see(part) for part in np.split(each, 10)]) for each in images]
    assert seen[0].shape == (100, 64)
    distance = frechet_distance(*(Moments.of(each).gaussian() for each in seen))
    assert distance == pytest.approx(12.7202, abs=1e-4)


@needs_weights
def test_kid(images):
    """0.0337 and 0.0023 (torchmetrics, KernelInceptionDistance), from its own choice of subsets."""
    extractor = load_inception()
    assert extractor.published
    seen = [summarize(extractor, [each], {"features"}, devices=jax.devices()[:1]).features for each in images]
    found = []
    for _ in range(100):
        rows = [torch.randperm(100)[:50].numpy() for _ in seen]
        found.append(squared_mmd(*(features[row] for features, row in zip(seen, rows, strict=True))))
    assert np.mean(found) == pytest.approx(0.033715, abs=2e-6)
    assert np.std(found) == pytest.approx(0.002327, abs=2e-6)


def test_the_first_features_are_means_after_the_first_pooling():
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), inception_v3.shapes(classifier=False))
    shape = jax.eval_shape(inception.features, params, jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8))
    assert shape.first.shape == (2, 64)
    assert shape.pool.shape == (2, 2048)
