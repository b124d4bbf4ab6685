"""From what a user asks for (steps, timesteps, indices or sigmas) to the levels that a sampler walks."""

import itertools
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.errors import InputError, check_int
from cm_jax.samplers.base import Sampler


class NoiseLevelArgs(TypedDict, total=False):
    """The noise levels of sampling; see `choose_levels`. At most one of them is not None."""

    steps: int | None
    timesteps: Sequence[int] | None
    indices: Sequence[int] | None
    sigmas: Sequence[float] | None


def choose_levels(
    sampler: Sampler,
    grid: KarrasGrid,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    tuned: Sequence[Sequence[int]] = (),
) -> tuple[float, ...]:
    """The falling levels at which the network is called, and the closing one at which the sampler ends.

    Give one of: `steps`, a number (the tuned timesteps of that length where there are any, else the sampler's own
    spacing); `timesteps`, grid indices from the cleanest to the noisiest as diffusers writes them, (22, 0); `indices`,
    grid indices from the noisiest to the cleanest with the closing one, (0, 22, 39), as the original writes them;
    `sigmas`, the levels themselves, falling, without the closing one. Raises InputError for anything else.
    """
    given = {"steps": steps, "timesteps": timesteps, "indices": indices, "sigmas": sigmas}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(f"Give one of steps, timesteps, indices or sigmas; got {' and '.join(named) or 'none'}.")
    if steps is not None:
        steps = check_int("steps", steps, 1, _MOST_STEPS)
        match = next((choice for choice in tuned if len(choice) == steps), None)
        if match is None or not sampler.ends_at_boundary:
            return sampler.levels(steps, grid)
        timesteps = match
    if timesteps is not None:
        order = _whole("timesteps", timesteps, grid)
        if not order or any(a <= b for a, b in itertools.pairwise(order)) or order[-1] != 0:
            raise InputError(
                f"timesteps must fall and end with 0, the noisiest level, e.g. 22,0; got {_shown(timesteps)}."
            )
        return (*(float(grid.sigma(index)) for index in reversed(order)), sampler.closing(grid))
    if indices is not None:
        order = _whole("indices", indices, grid)
        last = grid.levels - 1
        if len(order) < 2 or any(a >= b for a, b in itertools.pairwise(order)):
            raise InputError(
                f"indices must rise from 0, the noisiest level, to {last}, the closing one, e.g. "
                f"0,{last // 2},{last}; got {_shown(indices)}."
            )
        if order[0] != 0 or order[-1] != last:
            raise InputError(
                f"indices must begin with 0 and end with {last} (this model has {grid.levels} levels), or noise would "
                f"be left in the images; got {_shown(indices)}."
            )
        called = order[:-1] if sampler.ends_at_boundary else order
        return (*(float(grid.sigma(index)) for index in called), sampler.closing(grid))
    levels, closing = _rounded(sigmas), sampler.closing(grid)
    if not levels or not all(np.float32(closing) < sigma <= _HIGHEST for sigma in levels):
        raise InputError(
            f"sigmas must be finite, greater than {closing:g} and at most {_HIGHEST:g}; got {_shown(sigmas)}."
        )
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise InputError(f"sigmas must fall, e.g. {grid.sigma_max:g},1.38; got {_shown(sigmas)}.")
    return (*map(float, sigmas or ()), closing)


_MOST_STEPS = 10_000
_HIGHEST = 1e6
_LOWEST = 1e-6
"""Of the levels that a user may name; far beyond what images need, and safe in single precision."""


def _whole(name: str, values: Any, grid: KarrasGrid) -> list[int]:
    """Grid indices. Raises InputError for anything else."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise InputError(f"{name} must be a list of whole numbers, got {_shown(values)}.")
    return [check_int(f"{name} (this model has {grid.levels} levels)", each, 0, grid.levels - 1) for each in values]


def _rounded(values: Any) -> tuple[float, ...]:
    """Levels as the samplers will see them, in single precision; those too small to be one become 0."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise InputError(f"sigmas must be a list of numbers, got {_shown(values)}.")
    try:
        with np.errstate(over="ignore"):
            rounded = [float(np.float32(value)) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"sigmas must be a list of numbers, got {_shown(values)}.") from error
    return tuple(value if value >= _LOWEST else 0.0 for value in rounded)


def _shown(values: Any) -> str:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        return repr(values)[:60]
    return ",".join(str(value)[:20] for value in list(values)[:12]) or "an empty list"
