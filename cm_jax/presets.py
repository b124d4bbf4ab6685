"""Training runs by name: the papers' hyper-parameters, and small runs on the bundled emoji.

`PRESETS` maps a name to a function that makes its settings, whose docstring is its help. The FIDs are those that the
papers report for their own runs
(one step and two steps of the student, 50,000 images); none was reached here, where the data cannot be had.
"""

import dataclasses
from collections.abc import Callable

from cm_jax.data import EmojiData, ImageFolder, TFDSData
from cm_jax.diffusion.curricula import (
    AdaptiveTargetEMA,
    Constant,
    ConstantTargetEMA,
    Doubling,
    Progressive,
    ShrinkingGap,
    WarmUp,
)
from cm_jax.diffusion.distances import PseudoHuber
from cm_jax.diffusion.noise_distributions import CappedInterval, LogNormal
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning, MeanFlowPreconditioning
from cm_jax.diffusion.weightings import Karras
from cm_jax.networks import SongUNet
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256
from cm_jax.networks.song_unet import DDPMPP, NCSNPP
from cm_jax.objectives import (
    AdaptiveWeight,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    Denoising,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    MeanFlow,
)
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import decay_for_half_life
from cm_jax.training.learning_rates import ConstantRate, InverseRootDecay
from cm_jax.training.optimizers import Adam, RAdam

replace = dataclasses.replace


# The bundled emoji at 32 pixels: 3,334 images in 9 classes, a network of 7 million parameters.

_EMOJI_IMAGES = 6_400_000
_EMOJI_BATCH = 128
_EMOJI_STEPS = _EMOJI_IMAGES // _EMOJI_BATCH
_EMOJI_NETWORK = SongUNet(
    base_channels=64,
    channel_mult=(1, 2, 2),
    blocks_per_level=2,
    classes=9,
    embedding="positional",
    resampling="plain",
    pyramid=False,
    dropout=0.1,
)
_EDM = EDMPreconditioning(time_factor=EDM_TIME)
_BOUNDARY = ConsistencyPreconditioning(time_factor=EDM_TIME)
_EMOJI_TEACHER = "runs/emoji32-edm"

_EMOJI_EDM = TrainConfig(
    data=EmojiData(),
    network=_EMOJI_NETWORK,
    preconditioning=_EDM,
    objective=Denoising(),
    optimizer=Adam(ConstantRate(5e-4, warm_up=500), clip_norm=1.0),
    batch_size=_EMOJI_BATCH,
    images=_EMOJI_IMAGES,
    ema_decay=(0.999, 0.9999),
    power_ema=(0.1,),
    sample_every=2_000,
    checkpoint_every=2_000,
)
_EMOJI_STUDENT = replace(
    _EMOJI_EDM,
    network=replace(_EMOJI_NETWORK, dropout=0.0),
    preconditioning=_BOUNDARY,
    optimizer=RAdam(ConstantRate(2e-4), clip_norm=1.0),
)
_EMOJI_CURRICULUM = Progressive(start=2, end=150, steps=_EMOJI_STEPS)


def emoji32_edm() -> TrainConfig:
    """A denoiser of the bundled emoji, the teacher of what follows (EDM)."""
    return _EMOJI_EDM


def emoji32_cd() -> TrainConfig:
    """Consistency distillation of runs/emoji32-edm: 18 levels, Heun's teacher steps (CM, algorithm 2)."""
    return replace(
        _EMOJI_STUDENT,
        objective=ConsistencyDistillation(Constant(18)),
        target_ema=ConstantTargetEMA(0.95),
        teacher=_EMOJI_TEACHER,
    )


def emoji32_ct() -> TrainConfig:
    """Consistency training from scratch with a growing number of levels (CM, algorithm 3)."""
    return replace(
        _EMOJI_STUDENT,
        objective=ConsistencyTraining(_EMOJI_CURRICULUM),
        target_ema=AdaptiveTargetEMA(start=0.9),
    )


def emoji32_ict() -> TrainConfig:
    """Improved consistency training from scratch: pseudo-Huber distance, no lagging target (iCT)."""
    return replace(
        _EMOJI_STUDENT,
        network=replace(_EMOJI_NETWORK, dropout=0.2),
        objective=ImprovedConsistencyTraining(Doubling(10, 1280, steps=_EMOJI_STEPS)),
    )


def emoji32_ect() -> TrainConfig:
    """Consistency tuning of runs/emoji32-edm, whose weights it begins with (ECT)."""
    return replace(
        _EMOJI_STUDENT,
        network=replace(_EMOJI_NETWORK, dropout=0.2),
        preconditioning=_EDM,
        objective=EasyConsistencyTuning(gap=ShrinkingGap(steps_per_stage=_EMOJI_STEPS // 8)),
        init_from=_EMOJI_TEACHER,
    )


def emoji32_sct() -> TrainConfig:
    """Continuous-time consistency training from the weights of runs/emoji32-edm (sCM, sCT)."""
    return replace(
        _EMOJI_STUDENT,
        network=replace(_EMOJI_NETWORK, dropout=0.2, attention="plain"),
        preconditioning=_EDM,
        objective=ContinuousTraining(LogNormal(-1.0, 1.8), WarmUp(_EMOJI_STEPS // 10), adaptive=AdaptiveWeight()),
        optimizer=Adam(ConstantRate(1e-4), beta2=0.99, clip_norm=1.0),
        init_from=_EMOJI_TEACHER,
    )


def emoji32_scd() -> TrainConfig:
    """Continuous-time consistency distillation of runs/emoji32-edm (sCM, sCD)."""
    return replace(
        _EMOJI_STUDENT,
        network=replace(_EMOJI_NETWORK, dropout=0.0, attention="plain"),
        preconditioning=_EDM,
        objective=ContinuousDistillation(LogNormal(-1.0, 1.4), WarmUp(_EMOJI_STEPS // 10), adaptive=AdaptiveWeight()),
        optimizer=Adam(ConstantRate(1e-4), beta2=0.99, clip_norm=1.0),
        teacher=_EMOJI_TEACHER,
    )


def emoji32_meanflow() -> TrainConfig:
    """The mean velocity of the straight path, from scratch (MeanFlow)."""
    return replace(
        _EMOJI_STUDENT,
        network=replace(_EMOJI_NETWORK, dropout=0.1, attention="plain", interval_embedding=True),
        preconditioning=MeanFlowPreconditioning(),
        objective=MeanFlow(),
        optimizer=Adam(ConstantRate(3e-4, warm_up=500), beta2=0.95, clip_norm=1.0),
    )


# CIFAR-10, unconditional, as the papers train it.

_CIFAR_EDM = TrainConfig(
    data=TFDSData("cifar10"),
    network=replace(NCSNPP, dropout=0.13),
    preconditioning=_EDM,
    objective=Denoising(),
    optimizer=Adam(ConstantRate(1e-3, warm_up=19_531)),
    num_levels=18,
    batch_size=512,
    images=200_000_000,
    ema_decay=(decay_for_half_life(500_000, 512), 0.9999),
    sample_every=5_000,
    checkpoint_every=5_000,
    keep_every=50_000,
)
_CIFAR_TEACHER = "runs/cifar10-edm"
_CIFAR_STUDENT = replace(
    _CIFAR_EDM,
    network=NCSNPP,
    preconditioning=_BOUNDARY,
    optimizer=RAdam(ConstantRate(4e-4)),
    num_levels=None,
    images=409_600_000,
    ema_decay=(0.9999,),
)
_CIFAR_CURRICULUM = Progressive(start=2, end=150, steps=800_000)
_CIFAR_DDPMPP = replace(
    _CIFAR_EDM,
    network=replace(DDPMPP, dropout=0.13),
)


def cifar10_edm() -> TrainConfig:
    """A denoiser with NCSN++, the teacher of cifar10-cd (EDM: FID 1.98)."""
    return _CIFAR_EDM


def cifar10_edm_ddpmpp() -> TrainConfig:
    """A denoiser with DDPM++, from which ECT and sCM begin (EDM: FID 1.97)."""
    return _CIFAR_DDPMPP


def cifar10_cd() -> TrainConfig:
    """Consistency distillation of runs/cifar10-edm (CM: with LPIPS FID 3.55, in two steps 2.93). Squared distance
    unless told otherwise.
    """
    return replace(
        _CIFAR_STUDENT,
        objective=ConsistencyDistillation(Constant(18)),
        teacher=_CIFAR_TEACHER,
    )


def cifar10_ct() -> TrainConfig:
    """Consistency training (CM: with LPIPS FID 8.70, in two steps 5.83). Squared distance unless told otherwise."""
    return replace(
        _CIFAR_STUDENT,
        objective=ConsistencyTraining(_CIFAR_CURRICULUM),
        target_ema=AdaptiveTargetEMA(start=0.9),
    )


def cifar10_ict() -> TrainConfig:
    """Improved consistency training (iCT: FID 2.83, in two steps 2.46)."""
    return replace(
        _CIFAR_STUDENT,
        network=replace(NCSNPP, dropout=0.3, fourier_scale=0.02),
        objective=ImprovedConsistencyTraining(Doubling(10, 1280, steps=400_000)),
        optimizer=RAdam(ConstantRate(1e-4)),
        batch_size=1024,
        ema_decay=(0.99993,),
    )


def cifar10_ect() -> TrainConfig:
    """Consistency tuning of runs/cifar10-edm-ddpmpp (ECT at these 51 million images: FID 3.60, in two steps 2.11)."""
    return replace(
        _CIFAR_STUDENT,
        network=replace(DDPMPP, dropout=0.2),
        preconditioning=_EDM,
        num_levels=18,
        objective=EasyConsistencyTuning(gap=ShrinkingGap(steps_per_stage=25_000)),
        optimizer=RAdam(ConstantRate(1e-4)),
        batch_size=128,
        images=51_200_000,
        init_from="runs/cifar10-edm-ddpmpp",
        flip=False,
    )


def cifar10_sct() -> TrainConfig:
    """Continuous-time consistency training (sCT: FID 2.85, in two steps 2.06)."""
    return replace(
        _CIFAR_STUDENT,
        network=replace(DDPMPP, dropout=0.2, attention="plain"),
        preconditioning=_EDM,
        num_levels=18,
        objective=ContinuousTraining(LogNormal(-1.0, 1.8), adaptive=AdaptiveWeight()),
        optimizer=RAdam(ConstantRate(1e-4), beta2=0.99),
        images=204_800_000,
        ema_decay=(decay_for_half_life(500_000, 512),),
        init_from="runs/cifar10-edm-ddpmpp",
    )


def cifar10_scd() -> TrainConfig:
    """Continuous-time consistency distillation of runs/cifar10-edm-ddpmpp (sCD: FID 3.66, in two steps 2.52)."""
    return replace(
        _CIFAR_STUDENT,
        network=replace(DDPMPP, attention="plain"),
        preconditioning=_EDM,
        num_levels=18,
        objective=ContinuousDistillation(LogNormal(-1.0, 1.4), adaptive=AdaptiveWeight()),
        optimizer=RAdam(ConstantRate(1e-4), beta2=0.99),
        images=204_800_000,
        ema_decay=(decay_for_half_life(500_000, 512),),
        teacher="runs/cifar10-edm-ddpmpp",
    )


def cifar10_meanflow() -> TrainConfig:
    """MeanFlow with its authors' settings for CIFAR-10, without their augmentation (MeanFlow: FID 2.92)."""
    return replace(
        _CIFAR_STUDENT,
        network=replace(DDPMPP, resampling="fir", dropout=0.2, attention="plain", interval_embedding=True),
        preconditioning=MeanFlowPreconditioning(),
        num_levels=18,
        objective=MeanFlow(CappedInterval(), power=0.75, epsilon=1e-3),
        optimizer=Adam(ConstantRate(6e-4, warm_up=9_766)),
        batch_size=1024,
        images=819_200_000,
    )


# ImageNet at 64 pixels with its 1000 classes, and LSUN at 256 pixels, with the original's networks.

_SLOW = decay_for_half_life(50_000_000, 4096)
_IMAGENET_NETWORK = replace(IMAGENET64, precision="bfloat16")
_IMAGENET_EDM = TrainConfig(
    data=TFDSData("imagenet_resized/64x64"),
    network=replace(_IMAGENET_NETWORK, dropout=0.1),
    preconditioning=EDMPreconditioning(),
    objective=Denoising(),
    optimizer=RAdam(ConstantRate(1e-4)),
    batch_size=4096,
    images=2_500_000_000,
    ema_decay=(_SLOW, 0.999, 0.9999),
    sample_every=5_000,
    checkpoint_every=5_000,
    keep_every=50_000,
)
_IMAGENET_STUDENT = replace(
    _IMAGENET_EDM,
    network=_IMAGENET_NETWORK,
    preconditioning=ConsistencyPreconditioning(),
    batch_size=2048,
    ema_decay=(_SLOW, 0.999, 0.9999),
)
_IMAGENET_TEACHER = "edm_imagenet64_ema.pt"
_IMAGENET_CURRICULUM = Progressive(start=2, end=200, steps=800_000)
_LSUN_NETWORK = replace(LSUN256, precision="bfloat16")
_LSUN_EDM = replace(
    _IMAGENET_EDM,
    data=ImageFolder("lsun_bedroom", labels="none"),
    network=replace(_LSUN_NETWORK, dropout=0.1),
    batch_size=256,
    images=256_000_000,
)
_LSUN_STUDENT = replace(
    _LSUN_EDM, network=_LSUN_NETWORK, preconditioning=ConsistencyPreconditioning(), ema_decay=(_SLOW, 0.99994, 0.9999)
)
_LSUN_CURRICULUM = Progressive(start=2, end=150, steps=1_000_000)


def imagenet64_edm() -> TrainConfig:
    """A denoiser, the original's teacher (EDM: FID 2.44)."""
    return _IMAGENET_EDM


def imagenet64_cd() -> TrainConfig:
    """Consistency distillation of edm_imagenet64_ema.pt (CM: with LPIPS FID 6.20, in two steps 4.70). Squared distance
    unless told otherwise.
    """
    return replace(
        _IMAGENET_STUDENT,
        objective=ConsistencyDistillation(Constant(40)),
        optimizer=RAdam(ConstantRate(8e-6)),
        target_ema=ConstantTargetEMA(0.95),
        images=600_000 * 2048,
        teacher=_IMAGENET_TEACHER,
    )


def imagenet64_ct() -> TrainConfig:
    """Consistency training (CM: with LPIPS FID 13.0, in two steps 11.1). Squared distance unless told otherwise; the
    original's commands begin with the teacher's weights (--init-from), its paper from scratch.
    """
    return replace(
        _IMAGENET_STUDENT,
        objective=ConsistencyTraining(_IMAGENET_CURRICULUM),
        target_ema=AdaptiveTargetEMA(start=0.95),
        images=800_000 * 2048,
    )


def imagenet64_ict() -> TrainConfig:
    """Improved consistency training (iCT: FID 4.02, in two steps 3.20)."""
    return replace(
        _IMAGENET_STUDENT,
        network=replace(_IMAGENET_NETWORK, dropout=0.2, dropout_size=16),
        objective=ImprovedConsistencyTraining(Doubling(10, 1280, steps=800_000)),
        batch_size=4096,
        images=800_000 * 4096,
        ema_decay=(0.99997,),
    )


def imagenet64_ect() -> TrainConfig:
    """Consistency tuning of edm_imagenet64_ema.pt with ECT's settings for ImageNet (ECT, from an EDM2 network: FID 4.05
    to 2.49 by its size, in two steps 2.79 to 1.67).
    """
    return replace(
        _IMAGENET_STUDENT,
        network=replace(_IMAGENET_NETWORK, dropout=0.4, dropout_size=16),
        preconditioning=EDMPreconditioning(),
        objective=EasyConsistencyTuning(
            LogNormal(-0.8, 1.6),
            ShrinkingGap(ratio=4.0, steps_per_stage=25_000, stages=4),
            weighting=Karras(),
            distance=PseudoHuber(0.06 / (64 * 64 * 3) ** 0.5),
        ),
        optimizer=Adam(InverseRootDecay(1e-4, steps=2_000), beta2=0.99),
        batch_size=128,
        images=12_800_000,
        power_ema=(0.1,),
        init_from=_IMAGENET_TEACHER,
    )


def imagenet64_sct() -> TrainConfig:
    """Continuous-time consistency training from edm_imagenet64_ema.pt (sCT, from a TrigFlow network: FID 2.04, in two
    steps 1.48).
    """
    return replace(
        _IMAGENET_STUDENT,
        network=replace(_IMAGENET_NETWORK, dropout=0.45, dropout_size=16, attention="plain"),
        preconditioning=EDMPreconditioning(),
        objective=ContinuousTraining(LogNormal(-1.0, 1.6), adaptive=AdaptiveWeight()),
        optimizer=Adam(InverseRootDecay(1e-4, steps=35_000), beta2=0.99, epsilon=1e-11),
        images=400_000 * 2048,
        power_ema=(0.05,),
        init_from=_IMAGENET_TEACHER,
    )


def imagenet64_scd() -> TrainConfig:
    """Continuous-time consistency distillation of edm_imagenet64_ema.pt (sCD, from a TrigFlow network: FID 2.44, in two
    steps 1.66).
    """
    return replace(
        _IMAGENET_STUDENT,
        network=replace(_IMAGENET_NETWORK, attention="plain"),
        preconditioning=EDMPreconditioning(),
        objective=ContinuousDistillation(LogNormal(-1.0, 1.6), adaptive=AdaptiveWeight()),
        optimizer=Adam(InverseRootDecay(1e-4, steps=35_000), beta2=0.99, epsilon=1e-11),
        images=400_000 * 2048,
        power_ema=(0.05,),
        teacher=_IMAGENET_TEACHER,
    )


def lsun256_edm() -> TrainConfig:
    """A denoiser of LSUN bedrooms in a folder lsun_bedroom (EDM: FID 3.57)."""
    return _LSUN_EDM


def lsun256_cd() -> TrainConfig:
    """Consistency distillation of edm_bedroom256_ema.pt (CM: with LPIPS FID 7.80, in two steps 5.22). Squared distance
    unless told otherwise.
    """
    return replace(
        _LSUN_STUDENT,
        objective=ConsistencyDistillation(Constant(40)),
        optimizer=RAdam(ConstantRate(1e-5)),
        target_ema=ConstantTargetEMA(0.95),
        images=600_000 * 256,
        teacher="edm_bedroom256_ema.pt",
    )


def lsun256_ct() -> TrainConfig:
    """Consistency training (CM: with LPIPS FID 16.0, in two steps 7.85). Squared distance unless told otherwise."""
    return replace(
        _LSUN_STUDENT,
        objective=ConsistencyTraining(_LSUN_CURRICULUM),
        optimizer=RAdam(ConstantRate(5e-5)),
        target_ema=AdaptiveTargetEMA(start=0.95),
        images=1_000_000 * 256,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "emoji32-edm": emoji32_edm,
    "emoji32-cd": emoji32_cd,
    "emoji32-ct": emoji32_ct,
    "emoji32-ict": emoji32_ict,
    "emoji32-ect": emoji32_ect,
    "emoji32-sct": emoji32_sct,
    "emoji32-scd": emoji32_scd,
    "emoji32-meanflow": emoji32_meanflow,
    "cifar10-edm": cifar10_edm,
    "cifar10-edm-ddpmpp": cifar10_edm_ddpmpp,
    "cifar10-cd": cifar10_cd,
    "cifar10-ct": cifar10_ct,
    "cifar10-ict": cifar10_ict,
    "cifar10-ect": cifar10_ect,
    "cifar10-sct": cifar10_sct,
    "cifar10-scd": cifar10_scd,
    "cifar10-meanflow": cifar10_meanflow,
    "imagenet64-edm": imagenet64_edm,
    "imagenet64-cd": imagenet64_cd,
    "imagenet64-ct": imagenet64_ct,
    "imagenet64-ict": imagenet64_ict,
    "imagenet64-ect": imagenet64_ect,
    "imagenet64-sct": imagenet64_sct,
    "imagenet64-scd": imagenet64_scd,
    "lsun256-edm": lsun256_edm,
    "lsun256-cd": lsun256_cd,
    "lsun256-ct": lsun256_ct,
}
