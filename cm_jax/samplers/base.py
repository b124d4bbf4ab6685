"""The interface of samplers, and the choice of their noise levels from steps, timesteps, indices or sigmas."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from cm_jax.arguments import as_array, as_list
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.errors import InputError, check_int, nearest, one_line
from cm_jax.types import Denoiser, Images, NoiseSource

Levels = Float[Array, " n"]
"""Descending noise levels with the final one: n - 1 steps."""
Level = Float[Array, ""]
"""One noise level for the whole batch."""


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """sampler(denoiser, levels, noise) -> images.

    noise(0) is the initial noise, of standard deviation 1; noise(i + 1) belongs to step i, in the order of OpenAI's
    random numbers.
    """

    clip: bool | None = None
    """Clip denoised images and the result to [-1, 1], as in OpenAI's implementation; EDM's samplers clip nothing.
    None: as the model's config sets `clip_denoised`, and True without a model."""

    ends_at_boundary: ClassVar[bool] = False
    """Whether it ends where the model is the identity, so that it is not called at the last of the indices."""
    uses_tuned_levels: ClassVar[bool] = False
    """Whether `steps` stands for the model's tuned noise levels, if it has some for this number."""

    def levels(self, steps: int, schedule: KarrasSchedule, num_levels: int) -> tuple[float, ...]:
        """The default noise levels of `steps` steps for a model of `num_levels` levels, without the final level."""
        return tuple(map(float, schedule.descending(steps)))

    def final_level(self, schedule: KarrasSchedule, boundary: float) -> float:
        """The level after the last step; `boundary` is the level at which the model is the identity."""
        return 0.0

    def for_model(self, function: ConsistencyFunction) -> "Sampler":
        """The sampler with the settings that depend on the model. Raises InputError if it cannot sample from it."""
        return self

    def settings(self) -> dict[str, Any]:
        """The fields but `clip` that differ from their defaults, as JSON values; without those of repr=False."""
        fields = [each for each in dataclasses.fields(self) if each.repr and each.name != "clip"]
        values = {each.name: getattr(self, each.name) for each in fields if getattr(self, each.name) != each.default}
        return {name: value if isinstance(value, str | int) else repr(value) for name, value in values.items()}

    def num_noise_samples(self, steps: int) -> int:
        """The number of noise samples in `steps` steps, with the initial one."""
        return 1

    @abc.abstractmethod
    def __call__(self, denoiser: Denoiser, levels: Levels, noise: NoiseSource) -> Images: ...

    def clipped(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser with its images clipped to [-1, 1], unless `clip` is False."""
        return lambda x, sigma: self.bounded(denoiser(x, sigma))

    def bounded(self, images: Images) -> Images:
        """The images clipped to [-1, 1], unless `clip` is False."""
        return images if self.clip is False else jnp.clip(images, -1, 1)


def scan_steps(step: Callable[[Images, Any, Level, Level], Images], x: Images, levels: Levels) -> Images:
    """x after step(x, i, s_i, s_{i+1}) for every pair of consecutive levels; i is traced."""

    def body(x: Images, interval: tuple[Any, Level, Level]) -> tuple[Images, None]:
        return step(x, *interval), None

    return jax.lax.scan(body, x, (jnp.arange(levels.shape[0] - 1), levels[:-1], levels[1:]))[0]


class NoiseLevelArgs(TypedDict, total=False):
    """The noise levels of a sampler. Exactly one of these is given; index 0 is sigma_max."""

    steps: int | None
    """Number of steps: for the sampler consistency the tuned levels of this number if there are any, else the sampler's
    default levels."""
    timesteps: Sequence[int] | Integer[Array | np.ndarray, " n"] | None
    """Level indices, descending to 0, as in diffusers: (22, 0). The sampler's final level is added."""
    indices: Sequence[int] | Integer[Array | np.ndarray, " n"] | None
    """Level indices, ascending from 0 to the final level num_levels - 1, as in OpenAI's code: (0, 22, 39)."""
    sigmas: Sequence[float] | Float[Array | np.ndarray, " n"] | None
    """The levels themselves, descending: (80.0, 1.38). The sampler's final level is added; a closing 0, as in
    k-diffusion, stands for it."""


def levels_given(levels: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of NoiseLevelArgs that are not None. Raises InputError for other names."""
    names = list(NoiseLevelArgs.__annotations__)
    for name in levels:
        if name not in names:
            advice = nearest(name, names) or f" Noise levels are given as one of {', '.join(names)}."
            raise InputError(f"There is no argument {name!r}.{advice}")
    return {name: value for name, value in levels.items() if value is not None}


def choose_levels(
    sampler: Sampler,
    schedule: KarrasSchedule,
    num_levels: int,
    *,
    boundary: float | None = None,
    tuned: Sequence[Sequence[int]] = (),
    tuned_sigmas: Sequence[Sequence[float]] = (),
    **levels: Unpack[NoiseLevelArgs],
) -> tuple[float, ...]:
    """The descending levels at which the network is called, and the final level at which the sampler ends.

    `num_levels`: N of the level indices. `boundary`: the level at which the model is the identity, by default
    sigma_min. `tuned`, `tuned_sigmas`: tuned timesteps and sigmas. Raises InputError for invalid levels.
    """
    given = levels_given(levels)
    if len(given) != 1:
        raise InputError(f"Give one of steps, timesteps, indices or sigmas; got {' and '.join(given) or 'none'}.")
    ((name, values),) = given.items()
    final = sampler.final_level(schedule, schedule.sigma_min if boundary is None else boundary)
    last = num_levels - 1
    if name == "steps":
        steps = check_int("steps", values, 1, _MOST_STEPS)
        choices = [("timesteps", each) for each in tuned] + [("sigmas", each) for each in tuned_sigmas]
        match = next((choice for choice in choices if len(choice[1]) == steps), None)
        if match is None or not sampler.uses_tuned_levels:
            return (*sampler.levels(steps, schedule, num_levels), final)
        name, values = match
    if name == "sigmas":
        return (*_sigmas(values, schedule, final), final)
    order = _indices(name, values, num_levels)
    if name == "timesteps":
        if not order or any(a <= b for a, b in itertools.pairwise(order)) or order[-1] != 0:
            raise InputError(f"timesteps must descend to 0, the noisiest level, e.g. 22,0; got {_shown(values)}.")
        called = order[::-1]
    else:
        if len(order) < 2 or any(a >= b for a, b in itertools.pairwise(order)):
            raise InputError(
                f"indices must ascend from 0, the noisiest level, to {last}, the final one, e.g. "
                f"0,{last // 2},{last}; got {_shown(values)}."
            )
        if order[0] != 0 or order[-1] != last:
            raise InputError(
                f"indices must start with 0 and end with {last} (this model has {num_levels} levels), or noise would "
                f"be left in the images; got {_shown(values)}."
            )
        called = order[:-1] if sampler.ends_at_boundary else order
    return (*(float(schedule.sigma(index, num_levels)) for index in called), final)


_MOST_STEPS = 10_000
_HIGHEST = 1e6
_LOWEST = 1e-6
"""Bounds of user-defined levels, far beyond those of images and safe in single precision."""


def _indices(name: str, values: Any, num_levels: int) -> list[int]:
    """Level indices. Raises InputError for anything else."""
    listed = as_list(values)
    if listed is None:
        raise InputError(f"{name} must be a list of whole numbers, got {one_line(values)}.")
    return [check_int(f"{name} (this model has {num_levels} levels)", each, 0, num_levels - 1) for each in listed]


def _sigmas(values: Any, schedule: KarrasSchedule, final: float) -> tuple[float, ...]:
    """Levels above `final`, without a closing 0 or `final`.

    They are checked in single precision, as samplers use them; those below _LOWEST are 0.
    """
    given = as_array("sigmas", values)
    if given.ndim != 1:
        raise InputError(f"sigmas must be a list of numbers, got {one_line(values)}.")
    levels = np.asarray(given, np.float64)
    with np.errstate(over="ignore"):
        singles = levels.astype(np.float32)
    if len(levels) > 1 and levels[-1] in (0, final):
        levels, singles = levels[:-1], singles[:-1]
    rounded = np.where(singles >= _LOWEST, singles, 0)
    if not len(rounded) or not np.all((rounded > np.float32(final)) & (rounded <= _HIGHEST)):
        raise InputError(
            f"sigmas must be finite, greater than {final:g} and at most {_HIGHEST:g}; got {_shown(values)}."
        )
    if np.any(np.diff(rounded) >= 0):
        raise InputError(f"sigmas must descend, e.g. {schedule.sigma_max:g},1.38; got {_shown(values)}.")
    return tuple(levels.tolist())


def _shown(values: Any) -> str:
    listed = as_list(values)
    if listed is None:
        return one_line(values)
    return ",".join(str(value)[:20] for value in listed[:12]) or "an empty list"
