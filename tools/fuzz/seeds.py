"""Small valid files of every kind in one folder, to be damaged."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.networks import ADMUNet, SongUNet

NETWORK = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=16, classes=3
)
CONFIG = ModelConfig(NETWORK, ConsistencyPreconditioning(), KarrasGrid(18), ("a", "b", "c"), ((8, 0),))
JCM_NETWORK = SongUNet(image_size=8, base_channels=8, channel_mult=(1, 2), blocks_per_level=1)
WEIGHTS = {"vgg16": {"conv1_1": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}, "heads": {}}
"""Instead of the 58 MB of VGG16, which would be written for each input."""
STATE = {"params": {"kernel": jnp.ones((4, 8)), "half": jnp.ones(8, jnp.bfloat16)}, "key": jax.random.key(0)}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


def write(top: Path) -> None:
    """Write all files into `top`."""
    top.mkdir(parents=True)
    flat = iter(np.random.default_rng(0).normal(size=(1000, 1)).astype(np.float32))
    params = jax.tree.map(lambda leaf: np.broadcast_to(next(flat), leaf.shape).astype(np.float32), NETWORK.shapes())
    native.save(top / "native", CONFIG, params)
