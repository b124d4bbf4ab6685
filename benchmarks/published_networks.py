"""The networks of OpenAI's published checkpoints."""

from cm_jax.networks import ADMUNet

IMAGENET64 = ADMUNet()
LSUN256 = ADMUNet(
    image_size=256,
    width=256,
    multipliers=(1, 1, 2, 2, 4, 4),
    blocks_per_level=2,
    attention_factors=(8, 16, 32),
    classes=None,
    modulation="additive",
)
