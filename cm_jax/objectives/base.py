"""What objectives have in common."""

import abc
from typing import ClassVar, NamedTuple

import jax
from jaxtyping import Array, Float

from cm_jax.arrays import Images, Keys, Labels, Params
from cm_jax.curricula import Step
from cm_jax.errors import InputError

Losses = Float[Array, " b"]
"""One loss per image."""
Metrics = dict[str, Float[Array, " b"]]
"""What to log, one value per image: its noise level, and the grid's number of levels where there is a grid."""


class Batch(NamedTuple):
    """Clean images in [-1, 1], and their labels where the network has classes."""

    images: Images
    labels: Labels | None = None


class Helpers(NamedTuple):
    """Parameters that an objective uses and does not train."""

    target: Params | None = None
    """Of the target f^-. None: the student's own, held fixed (iCT, ECT; the target with mu = 0)."""
    teacher: Params | None = None
    """Of a pretrained denoiser, for distillation."""


class Objective(abc.ABC):
    """objective(params, helpers, batch, keys, step) -> losses and metrics, per image.

    `keys`: one per image; its level, noise and dropout come from it. `step`: the number k of steps taken, maybe traced.
    """

    has_target: ClassVar[bool] = False
    """Whether it looks at helpers.target."""
    has_teacher: ClassVar[bool] = False
    """Whether it needs helpers.teacher."""

    @abc.abstractmethod
    def __call__(
        self, params: Params, helpers: Helpers, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]: ...

    def extras(self) -> Params:
        """Fresh parameters that it trains beside the network's, under names of their own in the same tree."""
        return {}

    def teacher_params(self, helpers: Helpers) -> Params:
        """The teacher's parameters. Raises InputError where there are none."""
        if helpers.teacher is None:
            raise InputError(f"{type(self).__name__} needs a teacher: give the parameters of a denoiser as well.")
        return helpers.teacher


class Draws(NamedTuple):
    """Keys of an image by what they feed."""

    level: Keys
    noise: Keys
    dropout: Keys


def draws(keys: Keys) -> Draws:
    """Three keys per image. Student and target of a pair share the one of dropout, so that their masks agree."""
    return Draws(*jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys))
