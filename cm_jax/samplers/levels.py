"""From what a user asks for (steps, timesteps, indices or sigmas) to the levels that a sampler walks."""

import itertools
import math
from collections.abc import Sequence

from cm_jax.errors import InputError
from cm_jax.noise_levels import KarrasGrid
from cm_jax.samplers.base import Sampler


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
        if isinstance(steps, bool) or steps != int(steps) or steps < 1:
            raise InputError(f"steps must be a whole number of at least 1, got {steps}.")
        match = next((choice for choice in tuned if len(choice) == steps), None)
        if match is None or not sampler.ends_at_boundary:
            return sampler.levels(int(steps), grid)
        timesteps = match
    if timesteps is not None:
        order = list(timesteps)
        if not order or any(a <= b for a, b in itertools.pairwise(order)) or order[-1] != 0:
            raise InputError(
                f"timesteps must fall and end with 0, the noisiest level, e.g. 22,0; got {_shown(timesteps)}."
            )
        _check_indices("timesteps", order, grid)
        return (*(float(grid.sigma(index)) for index in reversed(order)), sampler.closing(grid))
    if indices is not None:
        order = list(indices)
        last = grid.levels - 1
        if len(order) < 2 or any(a >= b for a, b in itertools.pairwise(order)):
            raise InputError(
                f"indices must rise from 0, the noisiest level, to {last}, the closing one, e.g. "
                f"0,{last // 2},{last}; got {_shown(indices)}."
            )
        _check_indices("indices", order, grid)
        if order[0] != 0 or order[-1] != last:
            raise InputError(
                f"indices must begin with 0 and end with {last} (this model has {grid.levels} levels), or noise would "
                f"be left in the images; got {_shown(indices)}."
            )
        called = order[:-1] if sampler.ends_at_boundary else order
        return (*(float(grid.sigma(index)) for index in called), sampler.closing(grid))
    levels = tuple(float(sigma) for sigma in sigmas or ())
    closing = sampler.closing(grid)
    if not levels or not all(math.isfinite(sigma) and sigma > closing for sigma in levels):
        raise InputError(f"sigmas must be finite and greater than {closing:g}; got {_shown(levels)}.")
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise InputError(f"sigmas must fall, e.g. {grid.sigma_max:g},1.38; got {_shown(levels)}.")
    return (*levels, closing)


def _check_indices(name: str, order: list[int], grid: KarrasGrid) -> None:
    if any(index != int(index) or not 0 <= index < grid.levels for index in order):
        raise InputError(
            f"{name} must be whole numbers from 0 to {grid.levels - 1} (this model has {grid.levels} levels); "
            f"got {_shown(order)}."
        )


def _shown(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "an empty list"
