"""Unconditional CIFAR-10, as in the papers."""

import functools
from dataclasses import replace

from cm_jax import objectives
from cm_jax.data import TFDSData
from cm_jax.data.augmentation import Augmentation
from cm_jax.diffusion import curricula
from cm_jax.diffusion.noise_distributions import CappedInterval, LogNormal
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning, MeanFlowPreconditioning
from cm_jax.networks.song_unet import DDPMPP, NCSNPP
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import decay_for_half_life
from cm_jax.training.optimizers import Adam, ConstantRate, RAdam

_EDM = "edm-cifar10-32x32-uncond-vp.pkl"
"""Published by the authors of EDM: see docs/conversion.md."""
_EDM_NETWORK = replace(DDPMPP, label_embedding="linear", augment_dim=9)
"""The network of this file."""
_DDPMPP = replace(DDPMPP, augment_dim=9)
"""The network of cifar10-edm-ddpmpp."""
_config = functools.partial(
    TrainConfig, data=TFDSData("cifar10"), sample_every=5_000, checkpoint_every=5_000, keep_every=50_000
)


def cifar10_edm() -> TrainConfig:
    """Denoiser with NCSN++, the teacher in CM (EDM: FID 1.98), with EDM's augmentation."""
    return _config(
        network=replace(NCSNPP, dropout=0.13, augment_dim=9),
        augmentation=Augmentation(),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.Denoising(),
        optimizer=Adam(ConstantRate(1e-3, warm_up=19_531)),
        num_levels=18,
        batch_size=512,
        images=200_000_000,
        ema_decay=(decay_for_half_life(500_000, 512), 0.9999),
    )


def cifar10_edm_ddpmpp() -> TrainConfig:
    """Denoiser with DDPM++, the initialization of cifar10-sct and cifar10-scd (EDM: FID 1.97)."""
    return replace(cifar10_edm(), network=replace(_DDPMPP, dropout=0.13))


def cifar10_cd() -> TrainConfig:
    """Distillation of EDM's edm-cifar10-32x32-uncond-vp.pkl with the squared distance (CM with LPIPS, from NCSN++: FID
    3.55, in two steps 2.93).
    """
    return _config(
        network=_EDM_NETWORK,
        inherit_network=True,
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ConsistencyDistillation(curricula.Constant(18)),
        optimizer=RAdam(ConstantRate(4e-4)),
        teacher=_EDM,
        batch_size=512,
        images=800_000 * 512,
    )


def cifar10_ct() -> TrainConfig:
    """Consistency training with the squared distance (CM with LPIPS: FID 8.70, in two steps 5.83)."""
    return _config(
        network=NCSNPP,
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ConsistencyTraining(curricula.Progressive(start=2, end=150, steps=800_000)),
        optimizer=RAdam(ConstantRate(4e-4)),
        target_ema=curricula.AdaptiveTargetEMA(start=0.9),
        batch_size=512,
        images=800_000 * 512,
    )


def cifar10_ict() -> TrainConfig:
    """Improved consistency training (iCT: FID 2.83, in two steps 2.46)."""
    return _config(
        network=replace(NCSNPP, dropout=0.3, fourier_scale=0.02),
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ImprovedConsistencyTraining(curricula.Doubling(10, 1280, steps=400_000)),
        optimizer=RAdam(ConstantRate(1e-4)),
        batch_size=1024,
        images=400_000 * 1024,
        ema_decay=(0.99993,),
    )


def cifar10_ect() -> TrainConfig:
    """Consistency tuning of EDM's edm-cifar10-32x32-uncond-vp.pkl (ECT with these 51 million images: FID 3.60, in two
    steps 2.11).
    """
    return _config(
        network=replace(_EDM_NETWORK, dropout=0.2),
        inherit_network=True,
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.EasyConsistencyTuning(gap=curricula.ShrinkingGap(steps_per_stage=25_000)),
        optimizer=RAdam(ConstantRate(1e-4)),
        num_levels=18,
        init_from=_EDM,
        batch_size=128,
        images=400_000 * 128,
        flip=False,
    )


def cifar10_sct() -> TrainConfig:
    """Continuous-time consistency training (sCT: FID 2.85, in two steps 2.06)."""
    return _config(
        network=replace(_DDPMPP, dropout=0.2, attention="plain"),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ContinuousTraining(LogNormal(-1.0, 1.8), adaptive=objectives.AdaptiveWeight()),
        optimizer=RAdam(ConstantRate(1e-4), beta2=0.99),
        num_levels=18,
        init_from="runs/cifar10-edm-ddpmpp",
        batch_size=512,
        images=400_000 * 512,
        ema_decay=(decay_for_half_life(500_000, 512),),
    )


def cifar10_scd() -> TrainConfig:
    """Continuous-time consistency distillation of runs/cifar10-edm-ddpmpp (sCD: FID 3.66, in two steps 2.52)."""
    return _config(
        network=replace(_DDPMPP, attention="plain"),
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ContinuousDistillation(LogNormal(-1.0, 1.4), adaptive=objectives.AdaptiveWeight()),
        optimizer=RAdam(ConstantRate(1e-4), beta2=0.99),
        num_levels=18,
        teacher="runs/cifar10-edm-ddpmpp",
        batch_size=512,
        images=400_000 * 512,
        ema_decay=(decay_for_half_life(500_000, 512),),
    )


def cifar10_meanflow() -> TrainConfig:
    """MeanFlow with its authors' settings for CIFAR-10 and EDM's augmentation (MeanFlow: FID 2.92)."""
    return _config(
        network=replace(_DDPMPP, resampling="fir", dropout=0.2, attention="plain", interval_embedding=True),
        augmentation=Augmentation(),
        preconditioning=MeanFlowPreconditioning(),
        objective=objectives.MeanFlow(CappedInterval(), power=0.75, epsilon=1e-3),
        optimizer=Adam(ConstantRate(6e-4, warm_up=9_766)),
        num_levels=18,
        batch_size=1024,
        images=800_000 * 1024,
    )
