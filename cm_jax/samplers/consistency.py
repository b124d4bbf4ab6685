"""Samplers of consistency functions: in one step, in several with new noise in between, or in segments."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal, cast

import jax.numpy as jnp
import numpy as np

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.ode import dx_dsigma, euler_step
from cm_jax.diffusion.preconditioning import MeanFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.samplers.base import Levels, Sampler, scan_steps
from cm_jax.types import Denoiser, Images, NoiseSource, Sigmas


class Consistency(Sampler):
    """x_0 = f(x, s_i), then x = x_0 + sqrt(s_{i+1}^2 - boundary^2) z: CM, algorithm 1. One step is f(s_0 z, s_0).

    f(x, boundary) = x: the boundary is sigma_min in CM. With the preconditioning of a denoiser (ECT on ImageNet, TCM,
    sCM) it is 0, and the noise added has the standard deviation s_{i+1}.
    """

    ends_at_boundary: ClassVar[bool] = True
    uses_tuned_levels: ClassVar[bool] = True

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        """Levels of indices 0, q, 2q, ... with q = num_levels // steps, as in diffusers.

        For more steps than levels it is the schedule with N = steps.
        """
        if steps > num_levels:
            return super().levels(steps, schedule, num_levels)
        indices = [step * (num_levels // steps) for step in range(steps)]
        return tuple(float(schedule.sigma(index, num_levels)) for index in indices)

    def final_level(self, schedule: KarrasSchedule, boundary: float) -> float:
        return boundary

    def num_noise_samples(self, steps: int) -> int:
        return 1 if steps == 1 else steps + 1

    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images:
        denoiser, x = self.clipped(denoiser), levels[0] * noise(0)
        if levels.shape[0] == 2:
            return denoiser(x, jnp.full(x.shape[0], levels[0]))
        return multistep_sample(denoiser, x, levels, noise)


@dataclasses.dataclass(frozen=True)
class Segments(Sampler):
    """Deterministic steps from s_i to s_{i+1} along the ODE, each by one call f(x, s_i, s_{i+1}).

    For networks with interval_embedding: multi-segment sCD, whose training fixes the ends of the segments, and
    MeanFlow, z_r = z_t - (t - r) u(z_t, t, t - r). Both are Euler steps with f in place of the denoiser.
    """

    spacing: Literal["time", "flow_time", "log_snr"] | None = None
    """The default levels have equal steps of TrigFlow's time arctan(sigma / sigma_data), of MeanFlow's time
    sigma / (1 + sigma) from 1 on, or of ln sigma. None: flow_time for MeanFlow's preconditioning, time for others."""
    sigma_data: float | None = None
    """None: the model's; 0.5 without a model."""

    def for_model(self, function: ConsistencyFunction) -> Sampler:
        if not function.network.interval_embedding:
            raise InputError("Expected a network with interval_embedding for the sampler segments; use consistency.")
        own = function.preconditioning
        spacing = self.spacing or ("flow_time" if isinstance(own, MeanFlowPreconditioning) else "time")
        sigma_data = own.sigma_data if self.sigma_data is None else self.sigma_data
        return dataclasses.replace(self, spacing=spacing, sigma_data=sigma_data)

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        """With flow_time and more than 1 + sigma_max steps, the steps are equal from the time of sigma_max on."""
        highest, sigma_data = schedule.sigma_max, 0.5 if self.sigma_data is None else self.sigma_data
        if self.spacing == "flow_time":
            times = np.linspace(1 if steps < 1 + highest else highest / (1 + highest), 0, steps + 1)[1:-1]
            levels = times / (1 - times)
        elif self.spacing == "log_snr":
            levels = np.geomspace(highest, sigma_data * np.tan(1e-6), steps + 1)[1:-1]
        else:
            levels = sigma_data * np.tan(np.linspace(np.arctan(highest / sigma_data), 0, steps + 1)[1:-1])
        return (highest, *map(float, levels))

    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images:
        """Images from noise; `denoiser` has a third argument, the lower end of the segment."""
        f = cast(Callable[[Images, Sigmas, Sigmas], Images], denoiser)

        def step(x, index, now, after):
            until = jnp.full(x.shape[0], after)
            segment = functools.partial(dx_dsigma, lambda x, sigma: self.bounded(f(x, sigma, until)))
            return euler_step(segment, x, now, after)

        return self.bounded(scan_steps(step, levels[0] * noise(0), levels))


def multistep_sample(denoiser: Denoiser, x: Images, levels: Levels, noise: NoiseSource) -> Images:
    """CM, algorithm 1 from x at the first level: denoise, add new noise of the next level, and so on; no clipping.

    The last level is the boundary, at which no noise is added: the result is the last denoised image.
    """

    def step(x, index, now, after):
        clean = denoiser(x, jnp.full(x.shape[0], now))
        return clean + jnp.sqrt((after - levels[-1]) * (after + levels[-1])) * noise(index + 1)

    return scan_steps(step, x, levels)
