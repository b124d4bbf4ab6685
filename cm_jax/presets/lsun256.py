"""LSUN bedrooms at 256 pixels, in a folder lsun_bedroom, with OpenAI's network."""

import functools
from dataclasses import replace

from cm_jax import objectives
from cm_jax.data import ImageFolder
from cm_jax.diffusion import curricula
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.networks.adm_unet import LSUN256
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import decay_for_half_life
from cm_jax.training.optimizers import ConstantRate, RAdam

_NETWORK = replace(LSUN256, precision="bfloat16")
_config = functools.partial(
    TrainConfig,
    data=ImageFolder("lsun_bedroom", labels="none"),
    batch_size=256,
    sample_every=5_000,
    checkpoint_every=5_000,
    keep_every=50_000,
    ema_decay=(decay_for_half_life(50_000_000, 4096), 0.99994, 0.9999),
)


def lsun256_edm() -> TrainConfig:
    """Denoiser of LSUN bedrooms in a folder lsun_bedroom (EDM: FID 3.57)."""
    return _config(
        network=replace(_NETWORK, dropout=0.1),
        preconditioning=EDMPreconditioning(),
        objective=objectives.Denoising(),
        optimizer=RAdam(ConstantRate(1e-4)),
        images=1_000_000 * 256,
        ema_decay=(decay_for_half_life(50_000_000, 4096), 0.999, 0.9999),
    )


def lsun256_cd() -> TrainConfig:
    """Distillation of edm_bedroom256_ema.pt with the squared distance (CM with LPIPS: FID 7.80, in two steps 5.22)."""
    return _config(
        network=_NETWORK,
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.ConsistencyDistillation(curricula.Constant(40)),
        optimizer=RAdam(ConstantRate(1e-5)),
        target_ema=curricula.ConstantTargetEMA(0.95),
        teacher="edm_bedroom256_ema.pt",
        images=600_000 * 256,
    )


def lsun256_ct() -> TrainConfig:
    """Consistency training with the squared distance (CM with LPIPS: FID 16.0, in two steps 7.85)."""
    return _config(
        network=_NETWORK,
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.ConsistencyTraining(curricula.Progressive(start=2, end=150, steps=1_000_000)),
        optimizer=RAdam(ConstantRate(5e-5)),
        target_ema=curricula.AdaptiveTargetEMA(start=0.95),
        images=1_000_000 * 256,
    )
