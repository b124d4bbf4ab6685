"""Class-conditional ImageNet at 64 pixels, with OpenAI's network, or from EDM2's (ECT and sCM)."""

import functools
from dataclasses import replace

from cm_jax import objectives
from cm_jax.data import TFDSData
from cm_jax.diffusion import curricula
from cm_jax.diffusion.losses import Karras, PseudoHuber
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.networks import EDM2UNet
from cm_jax.networks.adm_unet import IMAGENET64
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import decay_for_half_life
from cm_jax.training.optimizers import Adam, ConstantRate, InverseRootDecay, RAdam

_NETWORK = replace(IMAGENET64, precision="bfloat16")
_EDM2 = "edm2-img64-s-1073741-0.075.pkl"
"""EDM2-S, published by its authors: see docs/conversion.md."""
_EDM2_NETWORK = EDM2UNet(precision="bfloat16")
"""The network of this file."""
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
    """Consistency tuning of EDM2-S, edm2-img64-s-1073741-0.075.pkl (ECT: FID 5.51, in two steps 3.18).

    For a larger network, give its file with --init-from, dropout 0.5 and a lower learning rate (XL: 7e-4).
    """
    return _config(
        network=replace(_EDM2_NETWORK, dropout=0.4, dropout_size=16),
        inherit_network=True,
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.EasyConsistencyTuning(
            LogNormal(-0.8, 1.6),
            curricula.ShrinkingGap(ratio=4.0, steps_per_stage=25_000, stages=4),
            weighting=Karras(),
            distance=PseudoHuber(0.06 / (64 * 64 * 3) ** 0.5),
        ),
        optimizer=Adam(InverseRootDecay(1e-3, steps=2_000), beta2=0.99),
        init_from=_EDM2,
        batch_size=128,
        images=100_000 * 128,
        ema_decay=(),
        power_ema=(0.1,),
    )


def imagenet64_sct() -> TrainConfig:
    """Continuous-time consistency training of EDM2-S, edm2-img64-s-1073741-0.075.pkl (sCT with XL, trained with
    TrigFlow first: FID 2.04, in two steps 1.48).
    """
    return _config(
        network=replace(_EDM2_NETWORK, dropout=0.45, dropout_size=16, attention="plain"),
        inherit_network=True,
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ContinuousTraining(LogNormal(-1.0, 1.6), adaptive=objectives.AdaptiveWeight()),
        optimizer=Adam(InverseRootDecay(1e-4, steps=35_000), beta2=0.99, epsilon=1e-11),
        init_from=_EDM2,
        batch_size=2048,
        images=400_000 * 2048,
        ema_decay=(),
        power_ema=(0.05,),
    )


def imagenet64_scd() -> TrainConfig:
    """Continuous-time consistency distillation of EDM2-S, edm2-img64-s-1073741-0.075.pkl (sCD with XL, trained with
    TrigFlow first: FID 2.44, in two steps 1.66).
    """
    return _config(
        network=replace(_EDM2_NETWORK, attention="plain"),
        inherit_network=True,
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME),
        objective=objectives.ContinuousDistillation(LogNormal(-1.0, 1.6), adaptive=objectives.AdaptiveWeight()),
        optimizer=Adam(InverseRootDecay(1e-4, steps=35_000), beta2=0.99, epsilon=1e-11),
        teacher=_EDM2,
        batch_size=2048,
        images=400_000 * 2048,
        ema_decay=(),
        power_ema=(0.05,),
    )
