"""The choice of guidance from a strength, a guide and an interval, and its checks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np

from cm_jax.arguments import as_list
from cm_jax.checkpoints.class_rows import class_rows
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.guidance import MAX_STRENGTH, AnyFunction, GuidedDenoiser, GuidedStudent, check_strength
from cm_jax.errors import InputError, one_line
from cm_jax.types import Params, digest

_ALL = (0.0, math.inf)
"""The interval of all noise levels."""


@runtime_checkable
class Guide(Protocol):
    """A model that guides another one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> Params: ...


class GuidanceArgs(TypedDict, total=False):
    """Guidance of a denoiser, or the strength for a consistency model that was distilled with a range of them."""

    guidance: float | None
    """g in D_ref + g (D - D_ref). 1, the default, is no guidance."""
    guide: Guide | None
    """The model of D_ref: a weaker one or an unconditional one. Default: the model itself without labels, for which it
    must have been trained with label dropout."""
    guidance_interval: Sequence[float] | None
    """(lo, hi): guidance only at noise levels lo < sigma <= hi. Default: at all."""


class Guidance(NamedTuple):
    """Checked arguments."""

    strength: float
    interval: tuple[float, float]
    guide: Guide | None

    def program(self, function: ConsistencyFunction, params: Params) -> tuple[AnyFunction, Params]:
        """The guided function and its parameters."""
        if function.network.guidance_embedding:
            student = GuidedStudent(function)
            return student, student.params(params, self.strength)
        denoiser, own = GuidedDenoiser(function), None
        if self.guide is not None:
            denoiser, own = GuidedDenoiser(function, self.guide.config.function), self.guide.params
        return denoiser, denoiser.params(params, own, self.strength, self.interval)

    def described(self) -> dict[str, Any]:
        """The settings as JSON values, for reports."""
        low, high = self.interval
        guide = {} if self.guide is None else {"guide_sha256": digest(self.guide.params)}
        interval = {} if (low, high) == _ALL else {"guidance_interval": f"{low:g}, {high:g}"}
        return {"guidance": self.strength, **guide, **interval}


def choose_guidance(
    config: ModelConfig,
    guidance: float | None = None,
    guide: Guide | None = None,
    guidance_interval: Sequence[float] | None = None,
) -> Guidance | None:
    """Guidance of a model with this config; None for no guidance. Raises InputError for what is impossible."""
    low, high = config.guidance_range or (0.0, MAX_STRENGTH)
    strength = check_strength("guidance", float(np.clip(1, low, high)) if guidance is None else guidance, low, high)
    details = guide is not None or guidance_interval is not None
    if config.network.guidance_embedding:
        if details:
            raise InputError(
                "This consistency model takes the guidance strength as an input: give guidance alone, without a guide "
                "and an interval."
            )
        return Guidance(strength, _ALL, None)
    if guidance is None and details:
        raise InputError("A guide or a guidance interval was given without a strength: give guidance as well.")
    if config.distilled and (details or strength != 1):
        raise InputError(
            "Expected a denoiser, got a consistency model: it cannot be guided in sampling. Guide its teacher in "
            "distillation (objective.guidance)."
        )
    interval = _interval(guidance_interval)
    if guide is not None:
        _check_guide(config, guide.config)
    elif strength != 1:
        _check_label_dropout(config)
    return None if strength == 1 else Guidance(strength, interval, guide)


def _interval(given: Sequence[float] | None) -> tuple[float, float]:
    if given is None:
        return _ALL
    try:
        low, high = map(float, as_list(given) or ())
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"Expected two noise levels as guidance interval, e.g. 0.28,2.9; got {one_line(given)}."
        ) from error
    if not 0 <= low < high:
        raise InputError(f"Expected a guidance interval 0 <= lo < hi, e.g. 0.28,2.9; got {low:g},{high:g}.")
    return low, high


def _check_guide(config: ModelConfig, guide: ModelConfig) -> None:
    """Raise InputError unless `guide` is a denoiser of the same images, without classes or with the same ones."""
    (shape, classes), (guide_shape, guide_classes) = (
        (each.network.image_shape, each.network.classes) for each in (config, guide)
    )
    problem = None
    if guide.distilled:
        problem = "a consistency model"
    elif guide_shape != shape:
        problem = f"one of images of shape {list(guide_shape)}, and the model's are {list(shape)}"
    elif guide_classes not in (None, classes):
        problem = f"one of {guide_classes} classes, and the model has {classes or 'none'}"
    elif config.class_names and guide.class_names:
        names, others = config.class_names, guide.class_names
        rows = zip(class_rows(names, others), class_rows(others, names), strict=True)
        other = next((number for number, found in enumerate(rows) if number not in found), None)
        if other is not None:
            problem = f"one whose class {other} is {others[other]!r}, and the model's is {names[other]!r}"
    if problem:
        raise InputError(f"Expected a denoiser of the same images and classes as guide, got {problem}.")


def _check_label_dropout(config: ModelConfig) -> None:
    """Raise InputError if the model is known to give no estimates without labels."""
    if config.network.classes is not None and config.label_dropout != 0:
        return
    reason = "is unconditional" if config.network.classes is None else "was trained without label dropout"
    raise InputError(f"This model {reason}, so it cannot guide itself: give another model as guide (--guidance-model).")
