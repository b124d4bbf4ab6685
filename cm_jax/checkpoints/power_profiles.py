"""Power-function EMAs of any width from snapshots of others (EDM2, section 3.2, "post-hoc EMA").

After t steps, the EMA of relative width s weights the parameters of step i by the integral over [i - 1, i] of

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)  for tau in [0, t],
    s^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

A linear combination of EMAs is the average whose weights are the same combination of their profiles. So any profile is
approximated by those of snapshots, by least squares.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WIDTHS = (0.001, 12**-0.5)
"""Range of relative widths. The largest is that of a uniform average, gamma = 0."""


def gamma(width: float) -> float:
    """Nonnegative root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = width^2 (EDM2, eq. 127)."""
    inverse = width**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


class Profile(NamedTuple):
    """The weights in time of a power-function EMA."""

    steps: int
    """t, at least 1."""
    width: float
    """Standard deviation of the weights over t."""


class Combination(NamedTuple):
    """An approximation of a profile by a linear combination of others."""

    weights: tuple[float, ...]
    """One for each profile; their sum is 1."""
    residual: float
    """|sum of weights times profiles - target| / |target| in the L2 norm."""


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> Float[np.ndarray, "a b"]:
    """Integrals of p_a p_b over [0, min(t_a, t_b)], of every profile in `a` and every one in `b`.

    With m = min(t_a, t_b):  (g_a + 1) (g_b + 1) / (g_a + g_b + 1)  (m / t_a)^(g_a + 1)  (m / t_b)^(g_b + 1) / m.
    """
    (t_a, g_a), (t_b, g_b) = _columns(a)[:, :, None], _columns(b)[:, None, :]
    m = np.minimum(t_a, t_b)
    scale = (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) / m
    return scale * (m / t_a) ** (g_a + 1) * (m / t_b) ** (g_b + 1)


def combine(profiles: Sequence[Profile], target: Profile) -> Combination:
    """The combination of different profiles that is nearest to `target` (EDM2, appendix C).

    x solves A x = b, with A the inner products of the profiles and b those with the target, and is divided by its sum,
    so that constant parameters stay constant.
    """
    products = inner_products(profiles, profiles)
    norms = np.sqrt(np.diag(products))  # with profiles of norm 1, A has a smaller condition number
    normalized, wanted = products / np.outer(norms, norms), inner_products(profiles, [target])[:, 0] / norms
    x = np.linalg.lstsq(normalized, wanted, rcond=1e-13)[0] / norms
    x /= x.sum()
    square = inner_products([target], [target])[0, 0]
    residual = x @ products @ x - 2 * x @ (wanted * norms) + square
    return Combination(tuple(map(float, x)), float(np.sqrt(max(residual, 0) / square)))


def _columns(profiles: Sequence[Profile]) -> Float[np.ndarray, "2 n"]:
    """Steps and exponents."""
    return np.array([(each.steps, gamma(each.width)) for each in profiles], np.float64).T
