"""The PyTorch networks of the benchmarks match cm_jax."""

import jax
import numpy as np
import pytest
import torch

from benchmarks.random_params import random_params
from benchmarks.torch_unet import TorchUNet
from cm_jax.networks import ADMUNet, SongUNet

CONDITIONAL = ADMUNet(
    image_size=16,
    base_channels=32,
    channel_mult=(1, 2, 3),
    blocks_per_level=2,
    attention_factors=(2,),
    head_dim=32,
    classes=5,
)
UNCONDITIONAL = ADMUNet(
    image_size=16,
    base_channels=32,
    channel_mult=(2, 1),
    blocks_per_level=1,
    attention_factors=(1, 2),
    head_dim=None,
    heads=4,
    classes=None,
    modulation="additive",
    resampling="convolution",
)
SONG = SongUNet(
    image_size=16,
    base_channels=32,
    channel_mult=(1, 2, 3),
    blocks_per_level=1,
    classes=5,
    embedding="positional",
    resampling="plain",
    pyramid=False,
)


@pytest.mark.parametrize("network", [CONDITIONAL, UNCONDITIONAL, SONG], ids=["conditional", "unconditional", "song"])
def test_torch_network_matches_cm_jax(network: ADMUNet | SongUNet) -> None:
    rng = np.random.default_rng(1)
    params = random_params(network)
    x = rng.standard_normal((3, *network.image_shape), np.float32)
    times = np.array([1095.5, 80.9, -1553.7], np.float32)
    labels = None if network.classes is None else np.array([0, 4, 2])

    output = jax.jit(network.predict)(params, x, times, labels)
    with torch.no_grad():
        torch_output = TorchUNet(network, params)(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(times),
            None if labels is None else torch.from_numpy(labels),
        )
    reference = torch_output.numpy().transpose(0, 2, 3, 1)
    assert 0.1 < reference.std() < 10
    np.testing.assert_allclose(output, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
