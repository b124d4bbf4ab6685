"""What objectives have in common."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import Step
from cm_jax.errors import InputError
from cm_jax.objectives.adaptive_weight import AdaptiveWeight, without_weight
from cm_jax.types import Images, Keys, Labels, Params

Losses = Float[Array, " b"]
"""One loss per image."""
Metrics = dict[str, Float[Array, " b"]]
"""What to log, one value per image: its noise level "sigma", and the grid's number of levels where there is a grid."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The functions at work, without their parameters: hashable, a static argument of jit."""

    student: ConsistencyFunction
    """What is trained, and the target too."""
    teacher: ConsistencyFunction | None = None
    """A pretrained denoiser, for distillation."""


class Batch(NamedTuple):
    """Clean images in [-1, 1], and their labels where the network has classes."""

    images: Images
    labels: Labels | None = None


class FrozenParams(NamedTuple):
    """Parameters that an objective uses and does not train."""

    target: Params | None = None
    """Of the target f^-. None: the student's own, held fixed (iCT, ECT; the target with mu = 0)."""
    teacher: Params | None = None
    """Of functions.teacher."""
    perceptual: Params | None = None
    """Of a distance that has weights of its own (LPIPS)."""


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """objective(functions, params, helpers, batch, keys, step) -> losses and metrics, per image.

    Its fields are the method's hyper-parameters, nothing else. `keys`: one per image; its level, noise and dropout come
    from it. `step`: the number k of steps taken, maybe traced. Whoever calls has called `check(functions)` once before.
    """

    adaptive: AdaptiveWeight | None = dataclasses.field(default=None, kw_only=True)
    """A weight w learnt along, which makes a loss e^w loss - w."""

    has_target: ClassVar[bool] = False
    """Whether it looks at helpers.target."""
    has_teacher: ClassVar[bool] = False
    """Whether it needs a teacher, in functions and in helpers."""
    makes_denoiser: ClassVar[bool] = False
    """Whether it trains a denoiser D, which samples in many steps, and not a consistency function."""
    hands_over: ClassVar[bool] = False
    """Whether the student becomes the teacher each time that its curriculum(step) changes."""

    def __call__(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        if self.adaptive is None:
            return self.evaluate(models, params, frozen, batch, keys, step)
        target = None if frozen.target is None else without_weight(frozen.target)
        teacher = None if frozen.teacher is None else without_weight(frozen.teacher)
        frozen = frozen._replace(target=target, teacher=teacher)
        losses, metrics = self.evaluate(models, without_weight(params), frozen, batch, keys, step)
        weight = self.adaptive(params, models.student.preconditioning.c_noise(metrics["sigma"]))
        return jnp.exp(weight) * losses - weight, metrics | {"unweighted": losses, "log_weight": weight}

    @abc.abstractmethod
    def evaluate(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        """As a call, before the weight that is learnt."""

    def check(self, models: Models) -> None:
        """Raises InputError for functions that it cannot train."""
        if not self.has_teacher:
            return
        if models.teacher is None:
            raise InputError(f"{type(self).__name__} needs a teacher: give a denoiser as well.")
        student, teacher = models.student.network, models.teacher.network
        if (student.image_shape, student.classes) != (teacher.image_shape, teacher.classes):
            raise InputError(
                f"Student and teacher must see the same images and classes; got {student.image_shape} with "
                f"{student.classes} classes and {teacher.image_shape} with {teacher.classes}."
            )

    def extras(self) -> Params:
        """Fresh parameters that it trains beside the network's, under names of their own in the same tree."""
        return {} if self.adaptive is None else self.adaptive.initialize()

    def teacher(self, models: Models, frozen: FrozenParams) -> tuple[ConsistencyFunction, Params]:
        """The teacher and its parameters. Raises InputError where either is missing."""
        if models.teacher is None or frozen.teacher is None:
            raise InputError(f"{type(self).__name__} needs a teacher: give a denoiser and its parameters as well.")
        return models.teacher, frozen.teacher


def demand_forward_derivatives(objective: Objective, function: ConsistencyFunction) -> None:
    """Raises InputError for a network that has none."""
    attention = getattr(function.network, "attention", "plain")
    if attention != "plain":
        raise InputError(
            f"{type(objective).__name__} needs forward derivatives, which fused attention does not have; the network's "
            f'is {attention!r}. Use dataclasses.replace(network, attention="plain").'
        )


class SampleKeys(NamedTuple):
    """Keys of an image by what they feed."""

    level: Keys
    noise: Keys
    dropout: Keys


def split_keys(keys: Keys) -> SampleKeys:
    """Three keys per image. Student and target of a pair share the one of dropout, so that their masks agree."""
    return SampleKeys(*jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys))
