"""Class-conditional ImageNet at 64 pixels, with OpenAI's network."""

import functools
from dataclasses import replace

from cm_jax import objectives
from cm_jax.data import TFDSData
from cm_jax.diffusion import curricula
from cm_jax.diffusion.losses import Karras, PseudoHuber
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.networks.adm_unet import IMAGENET64
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import decay_for_half_life
from cm_jax.training.optimizers import Adam, ConstantRate, InverseRootDecay, RAdam

_NETWORK = replace(IMAGENET64, precision="bfloat16")
_config = functools.partial(
    TrainConfig,
    data=TFDSData("imagenet_resized/64x64"),
    sample_every=5_000,
    checkpoint_every=5_000,
    keep_every=50_000,
    ema_decay=(decay_for_half_life(50_000_000, 4096), 0.999, 0.9999),
)


def imagenet64_edm() -> TrainConfig:
    """Denoiser, the teacher of CM (EDM: FID 2.44)."""
    return _config(
        network=replace(_NETWORK, dropout=0.1),
        preconditioning=EDMPreconditioning(),
        objective=objectives.Denoising(),
        optimizer=RAdam(ConstantRate(1e-4)),
        batch_size=4096,
        images=2_500_000_000,
    )


def imagenet64_cd() -> TrainConfig:
    """Distillation of edm_imagenet64_ema.pt with the squared distance (CM with LPIPS: FID 6.20, in two steps 4.70)."""
    return _config(
        network=_NETWORK,
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.ConsistencyDistillation(curricula.Constant(40)),
        optimizer=RAdam(ConstantRate(8e-6)),
        target_ema=curricula.ConstantTargetEMA(0.95),
        teacher="edm_imagenet64_ema.pt",
        batch_size=2048,
        images=600_000 * 2048,
    )


def imagenet64_ct() -> TrainConfig:
    """Consistency training with the squared distance (CM with LPIPS: FID 13.0, in two steps 11.1).

    OpenAI's commands initialize from the teacher (--init-from), the paper trains from scratch.
    """
    return _config(
        network=_NETWORK,
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.ConsistencyTraining(curricula.Progressive(start=2, end=200, steps=800_000)),
        optimizer=RAdam(ConstantRate(1e-4)),
        target_ema=curricula.AdaptiveTargetEMA(start=0.95),
        batch_size=2048,
        images=800_000 * 2048,
    )


def imagenet64_ict() -> TrainConfig:
    """Improved consistency training (iCT: FID 4.02, in two steps 3.20)."""
    return _config(
        network=replace(_NETWORK, dropout=0.2, dropout_size=16),
        preconditioning=ConsistencyPreconditioning(),
        objective=objectives.ImprovedConsistencyTraining(curricula.Doubling(10, 1280, steps=800_000)),
        optimizer=RAdam(ConstantRate(1e-4)),
        batch_size=4096,
        images=800_000 * 4096,
        ema_decay=(0.99997,),
    )


def imagenet64_ect() -> TrainConfig:
    """Consistency tuning of edm_imagenet64_ema.pt with ECT's settings for ImageNet (ECT, from an EDM2 network: FID 4.05
    to 2.49 by its size, in two steps 2.79 to 1.67).
    """
    return _config(
        network=replace(_NETWORK, dropout=0.4, dropout_size=16),
        preconditioning=EDMPreconditioning(),
        objective=objectives.EasyConsistencyTuning(
            LogNormal(-0.8, 1.6),
            curricula.ShrinkingGap(ratio=4.0, steps_per_stage=25_000, stages=4),
            weighting=Karras(),
            distance=PseudoHuber(0.06 / (64 * 64 * 3) ** 0.5),
        ),
        optimizer=Adam(InverseRootDecay(1e-4, steps=2_000), beta2=0.99),
        init_from="edm_imagenet64_ema.pt",
        batch_size=128,
        images=100_000 * 128,
        power_ema=(0.1,),
    )


def imagenet64_sct() -> TrainConfig:
    """Continuous-time consistency training from edm_imagenet64_ema.pt (sCT, from a TrigFlow network: FID 2.04, in two
    steps 1.48).
    """
    return _config(
        network=replace(_NETWORK, dropout=0.45, dropout_size=16, attention="plain"),
        preconditioning=EDMPreconditioning(),
        objective=objectives.ContinuousTraining(LogNormal(-1.0, 1.6), adaptive=objectives.AdaptiveWeight()),
        optimizer=Adam(InverseRootDecay(1e-4, steps=35_000), beta2=0.99, epsilon=1e-11),
        init_from="edm_imagenet64_ema.pt",
        batch_size=2048,
        images=400_000 * 2048,
        power_ema=(0.05,),
    )


def imagenet64_scd() -> TrainConfig:
    """Continuous-time consistency distillation of edm_imagenet64_ema.pt (sCD, from a TrigFlow network: FID 2.44, in two
    steps 1.66).
    """
    return _config(
        network=replace(_NETWORK, attention="plain"),
        preconditioning=EDMPreconditioning(),
        objective=objectives.ContinuousDistillation(LogNormal(-1.0, 1.6), adaptive=objectives.AdaptiveWeight()),
        optimizer=Adam(InverseRootDecay(1e-4, steps=35_000), beta2=0.99, epsilon=1e-11),
        teacher="edm_imagenet64_ema.pt",
        batch_size=2048,
        images=400_000 * 2048,
        power_ema=(0.05,),
    )
