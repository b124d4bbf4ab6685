"""A first run in minutes: the bundled emoji at 16 pixels, with OpenAI's architecture (2.1 million parameters)."""

import functools
from dataclasses import replace

from cm_jax import objectives
from cm_jax.data import EmojiData
from cm_jax.diffusion import curricula
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.networks import ADMUNet
from cm_jax.training.config import TrainConfig
from cm_jax.training.optimizers import Adam, ConstantRate, RAdam

_NETWORK = ADMUNet(
    image_size=16,
    base_channels=32,
    channel_mult=(1, 2, 3),
    blocks_per_level=1,
    attention_factors=(4,),
    head_dim=32,
    classes=9,
)
_STEPS = 2_000
_config = functools.partial(
    TrainConfig,
    network=_NETWORK,
    data=EmojiData(),
    batch_size=64,
    images=_STEPS * 64,
    ema_decay=(0.998,),
    sample_every=500,
    checkpoint_every=500,
)


def emoji16_edm() -> TrainConfig:
    """Denoiser of the bundled emoji at 16 pixels, the teacher of the other emoji16 presets (EDM)."""
    return _config(
        preconditioning=EDMPreconditioning(),
        objective=objectives.Denoising(),
        optimizer=Adam(ConstantRate(1e-3, warm_up=200), clip_norm=1.0),
        images=2 * _STEPS * 64,
    )


def emoji16_ect() -> TrainConfig:
    """Easy consistency tuning, initialized from runs/emoji16-edm (ECT), for export to diffusers and OpenAI's format."""
    return _config(
        network=replace(_NETWORK, dropout=0.05),
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.EasyConsistencyTuning(gap=curricula.ShrinkingGap(steps_per_stage=_STEPS // 8)),
        optimizer=RAdam(ConstantRate(4e-4), clip_norm=1.0),
        init_from="runs/emoji16-edm",
    )


def emoji16_cd() -> TrainConfig:
    """Consistency distillation of runs/emoji16-edm with N = 18 and Heun steps (CM, algorithm 2)."""
    return _config(
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.ConsistencyDistillation(curricula.Constant(18)),
        optimizer=RAdam(ConstantRate(4e-4), clip_norm=1.0),
        target_ema=curricula.ConstantTargetEMA(0.95),
        teacher="runs/emoji16-edm",
    )
