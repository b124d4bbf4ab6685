"""Easy consistency tuning: from a denoiser to a consistency model by shrinking the gap between t and r (ECT)."""

import dataclasses

import jax.numpy as jnp

from cm_jax.diffusion.curricula import ShrinkingGap, Step
from cm_jax.diffusion.losses import AnyWeighting, InverseGap, PseudoHuber
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.objectives.base import Losses, Metrics, PairObjective
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Keys, Sigmas, per_image


@dataclasses.dataclass(frozen=True)
class EasyConsistencyTuning(PairObjective):
    """w(t, r) d(f(x + t z, t), f^-(x + r z, r)) with r = r(t, k); f^- is x itself where r = 0      (ECT, algorithm 1).

    Initialize it from a denoiser and keep its preconditioning. The defaults are those for CIFAR-10: the norm, weighted
    by 1 / (t - r). For ImageNet-64 they are the pseudo-Huber distance and 1 / c_out^2 (Karras).
    """

    noise_distribution: LogNormal = LogNormal(-1.1, 2.0)
    gap: ShrinkingGap = ShrinkingGap()
    weighting: AnyWeighting = InverseGap()
    distance: AnyDistance = PseudoHuber(0.0)

    def sample_pair(self, keys: Keys, schedule: KarrasSchedule, step: Step) -> tuple[Sigmas, Sigmas, Metrics]:
        t = self.noise_distribution(keys)
        r = self.gap(t, step)
        return t, r, {"ratio": r / t}

    def losses(
        self, student: Denoiser, target: Denoiser, images: Images, t: Sigmas, r: Sigmas, noise: Images, **rest
    ) -> Losses:
        def clean_at_zero(x: Images, sigma: Sigmas) -> Images:
            return jnp.where(per_image(sigma) > 0, target(x, sigma), x)

        return super().losses(student, clean_at_zero, images, t, r, noise, **rest)
