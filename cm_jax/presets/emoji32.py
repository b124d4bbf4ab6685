"""The bundled emoji at 32 pixels: the network of the bundled models, DDPM++ with 2.9 million parameters."""

import functools
from dataclasses import replace

from cm_jax import objectives
from cm_jax.data import EmojiData
from cm_jax.diffusion import curricula
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning, MeanFlowPreconditioning
from cm_jax.networks.song_unet import DDPMPP
from cm_jax.training.config import TrainConfig
from cm_jax.training.optimizers import Adam, ConstantRate, LinearDecay, RAdam

_NETWORK = replace(DDPMPP, base_channels=32, channel_mult=(1, 2, 4), blocks_per_level=1, classes=9)
_STEPS = 10_000
"""Of the students; the teacher has three times as many."""
_config = functools.partial(
    TrainConfig, data=EmojiData(), batch_size=32, images=_STEPS * 32, ema_decay=(0.999,), power_ema=(0.1,)
)


def emoji32_edm() -> TrainConfig:
    """Denoiser of the bundled emoji, the teacher of the other presets (EDM)."""
    return _config(
        network=_NETWORK,
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.Denoising(),
        optimizer=Adam(ConstantRate(1e-3, warm_up=500), clip_norm=1.0),
        images=3 * _STEPS * 32,
    )


def emoji32_cd() -> TrainConfig:
    """Consistency distillation of runs/emoji32-edm with N = 18 and Heun steps (CM, algorithm 2)."""
    return _config(
        network=_NETWORK,
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ConsistencyDistillation(curricula.Constant(18)),
        optimizer=RAdam(ConstantRate(4e-4), clip_norm=1.0),
        target_ema=curricula.ConstantTargetEMA(0.95),
        teacher="runs/emoji32-edm",
    )


def emoji32_ct() -> TrainConfig:
    """Consistency training from scratch with increasing N (CM, algorithm 3).

    N grows to 61: with the paper's 151 levels, the target would be too slow for 10,000 steps (docs/recipes.md).
    """
    return _config(
        network=_NETWORK,
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ConsistencyTraining(curricula.Progressive(start=10, end=60, steps=_STEPS)),
        optimizer=RAdam(ConstantRate(4e-4), clip_norm=1.0),
        target_ema=curricula.AdaptiveTargetEMA(start=0.9),
    )


def emoji32_ict() -> TrainConfig:
    """Improved consistency training from scratch: pseudo-Huber distance, no target EMA (iCT)."""
    return _config(
        network=replace(_NETWORK, dropout=0.05),
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ImprovedConsistencyTraining(curricula.Doubling(10, 1280, steps=_STEPS)),
        optimizer=RAdam(ConstantRate(4e-4), clip_norm=1.0),
    )


def emoji32_ect() -> TrainConfig:
    """Easy consistency tuning, initialized from runs/emoji32-edm (ECT)."""
    return _config(
        network=replace(_NETWORK, dropout=0.05),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.EasyConsistencyTuning(gap=curricula.ShrinkingGap(steps_per_stage=_STEPS // 8)),
        optimizer=RAdam(ConstantRate(4e-4), clip_norm=1.0),
        init_from="runs/emoji32-edm",
    )


def emoji32_sct() -> TrainConfig:
    """Continuous-time consistency training, initialized from runs/emoji32-edm (sCM, sCT).

    The decay and lower noise levels than in the paper suit small batches (docs/recipes.md).
    """
    return _config(
        network=replace(_NETWORK, dropout=0.05, attention="plain"),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ContinuousTraining(
            LogNormal(-1.4, 1.8), curricula.WarmUp(_STEPS // 10), adaptive=objectives.AdaptiveWeight()
        ),
        optimizer=Adam(LinearDecay(2e-4, steps=_STEPS), beta2=0.99, clip_norm=1.0),
        init_from="runs/emoji32-edm",
    )


def emoji32_scd() -> TrainConfig:
    """Continuous-time consistency distillation of runs/emoji32-edm (sCM, sCD)."""
    return _config(
        network=replace(_NETWORK, attention="plain"),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ContinuousDistillation(
            LogNormal(-1.0, 1.4), curricula.WarmUp(_STEPS // 10), adaptive=objectives.AdaptiveWeight()
        ),
        optimizer=Adam(ConstantRate(2e-4), beta2=0.99, clip_norm=1.0),
        teacher="runs/emoji32-edm",
    )


def emoji32_meanflow() -> TrainConfig:
    """Average velocity of the linear path, from scratch (MeanFlow)."""
    return _config(
        network=replace(_NETWORK, dropout=0.05, attention="plain", interval_embedding=True),
        preconditioning=MeanFlowPreconditioning(),
        objective=objectives.MeanFlow(),
        optimizer=Adam(ConstantRate(6e-4, warm_up=_STEPS // 100), beta2=0.95, clip_norm=1.0),
    )
