"""Guidance: a denoiser extrapolated away from a worse one (classifier-free guidance, autoguidance)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.errors import InputError, one_line
from cm_jax.types import Denoiser, Images, Keys, Labels, Network, Params, Sigmas, per_image

MAX_STRENGTH = 1000.0


def guided(denoiser: Denoiser, guide: Denoiser, strength: Any, low: Any = -math.inf, high: Any = math.inf) -> Denoiser:
    """D_ref + g (D - D_ref) for low < sigma <= high, D elsewhere (Karras et al. 2024, eq. 3; Kynkäänniemi et al. 2024).

    strength: g, one for all images or one per image; 1 is D itself. It may be traced, as may the interval. The guide
    D_ref is evaluated only if an image of the batch needs it.
    """

    def mixed(x: Images, sigma: Sigmas) -> Images:
        estimate, inside = denoiser(x, sigma), (low < sigma) & (sigma <= high)
        strengths = jnp.where(inside, strength, 1.0)

        def extrapolated() -> Images:
            reference, g = guide(x, sigma), per_image(strengths)
            return jnp.where(g == 1, estimate, reference + g * (estimate - reference))

        return jax.lax.cond((strengths != 1).any(), extrapolated, lambda: estimate)

    return mixed


def no_labels(network: Network, labels: Labels | None) -> Labels:
    """The label `classes`, which stands for no label, for every image. Raises InputError for unconditional networks."""
    if network.classes is None or labels is None:
        raise InputError(
            "Classifier-free guidance needs a class-conditional network, and this one is unconditional: give another "
            "model as guide."
        )
    return jnp.full_like(labels, network.classes)


@dataclasses.dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser guided by another one, or by itself without labels. Samplers use it like a ConsistencyFunction."""

    function: ConsistencyFunction
    guide: ConsistencyFunction | None = None
    """D_ref: a weaker model (autoguidance) or an unconditional one. None: the function itself without labels."""

    @property
    def network(self) -> Network:
        return self.function.network

    def params(
        self, params: Params, guide: Params | None, strength: float, interval: tuple[float, float] = (0.0, math.inf)
    ) -> Params:
        """The parameters of `denoiser`. One compiled program serves every strength and interval."""
        numbers = {"strength": jnp.float32(strength), "interval": jnp.asarray(interval, jnp.float32)}
        return {"function": params, "guide": guide, **numbers}

    def denoiser(self, params: Params, labels: Labels | None = None) -> Denoiser:
        """(x, sigma) -> guided estimates of the clean images. An unconditional guide ignores the labels."""
        own = self.function.denoiser(params["function"], labels)
        if self.guide is None:
            reference = self.function.denoiser(params["function"], no_labels(self.network, labels))
        else:
            conditional = self.guide.network.classes is not None
            reference = self.guide.denoiser(params["guide"], labels if conditional else None)
        return guided(own, reference, params["strength"], *params["interval"])


@dataclasses.dataclass(frozen=True)
class GuidedStudent:
    """A consistency function distilled from a guided teacher, whose network has the guidance strength as an input."""

    function: ConsistencyFunction

    @property
    def network(self) -> Network:
        return self.function.network

    def params(self, params: Params, strength: float) -> Params:
        """The parameters of `denoiser`."""
        return {"function": params, "strength": jnp.float32(strength)}

    def denoiser(self, params: Params, labels: Labels | None = None) -> Denoiser:
        return self.function.denoiser(params["function"], labels, guidance=params["strength"])


AnyFunction = ConsistencyFunction | GuidedDenoiser | GuidedStudent
"""What samplers use: `network`, and `denoiser(params, labels)`."""


def check_strength(name: str, strength: Any, low: float = 0.0, high: float = MAX_STRENGTH) -> float:
    """The strength as a number. Raises InputError for anything but a number in [low, high]."""
    try:
        number = math.nan if isinstance(strength, bool | str) else float(strength)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"Expected {name} in [{low:g}, {high:g}] (1 is no guidance), got {one_line(strength)}.")
    return number


@dataclasses.dataclass(frozen=True)
class FixedGuidance:
    """The same guidance strength for all images."""

    strength: float = 1.5
    """Guidance strength; 1: no guidance."""

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)

    def __call__(self, keys: Keys) -> Float[Array, " b"]:
        return jnp.full(keys.shape, self.strength, jnp.float32)


@dataclasses.dataclass(frozen=True)
class UniformGuidance:
    """Guidance strengths sampled uniformly from [low, high], one per image; an input of the student's network."""

    low: float = 1.0
    """Lowest strength."""
    high: float = 4.0
    """Highest strength."""

    def __post_init__(self) -> None:
        check_strength("low", self.low)
        check_strength("high", self.high)
        if not self.low < self.high:
            raise InputError(f"Expected guidance low < high, got {self.low:g} and {self.high:g}.")

    def __call__(self, keys: Keys) -> Float[Array, " b"]:
        return jax.vmap(lambda key: jax.random.uniform(key, (), minval=self.low, maxval=self.high))(keys)


AnyGuidance = FixedGuidance | UniformGuidance
