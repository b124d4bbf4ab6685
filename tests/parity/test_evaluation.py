"""Parity with the FID and KID in the documentation of torchmetrics, from its random images and the real weights."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import torch

from cm_jax.evaluation import Moments, frechet_distance, load_inception, squared_mmd, summarize
from cm_jax.feature_networks import inception_v3
from cm_jax.parallelism import OneDevice

needs_weights = pytest.mark.skipif(
    not os.environ.get(inception_v3.FILE.variable),
    reason=f"needs the real weights: set {inception_v3.FILE.variable} as described in docs/conversion.md",
)


@pytest.fixture(scope="module")
def images():
    """The random images of the torchmetrics doctests, after the random initialization of its network."""
    torch.manual_seed(123)
    torch.rand(23_816_528)
    low = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    high = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    return [np.ascontiguousarray(each.permute(0, 2, 3, 1).numpy()) for each in (low, high)]


@needs_weights
def test_fid_of_64_features(images):
    """FrechetInceptionDistance of torchmetrics: 12.7202."""
    params = load_inception().params
    extract = jax.jit(lambda images: inception_v3.features(params, images).first)
    features = [np.concatenate([extract(part) for part in np.split(each, 10)]) for each in images]
    assert features[0].shape == (100, 64)
    distance = frechet_distance(*(Moments.of(each).gaussian() for each in features))
    assert distance == pytest.approx(12.7202, abs=1e-4)


@needs_weights
def test_kid(images):
    """KernelInceptionDistance of torchmetrics with its subsets: mean 0.0337, std 0.0023."""
    extractor = dataclasses.replace(load_inception(), parallelism=OneDevice())
    assert extractor.published
    seen = [summarize(extractor, [each], {"features"}).features for each in images]
    found = []
    for _ in range(100):
        rows = [torch.randperm(100)[:50].numpy() for _ in seen]
        found.append(squared_mmd(*(features[row] for features, row in zip(seen, rows, strict=True))))
    assert np.mean(found) == pytest.approx(0.033715, abs=2e-6)
    assert np.std(found) == pytest.approx(0.002327, abs=2e-6)


def test_shapes_of_features():
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), inception_v3.shapes(classifier=False))
    shape = jax.eval_shape(inception_v3.features, params, jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8))
    assert shape.first.shape == (2, 64)
    assert shape.pool.shape == (2, 2048)
