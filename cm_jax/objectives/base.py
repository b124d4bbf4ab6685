"""The interface of objectives, and the loss on pairs of noise levels that most of them share."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import AnyCurriculum, Curriculum, Step
from cm_jax.diffusion.distances import Distance
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.weightings import AnyWeighting
from cm_jax.errors import InputError
from cm_jax.objectives.adaptive_weight import AdaptiveWeight, without_weight
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Keys, Labels, Params, Sigmas, normal_per_image, per_image

Losses = Float[Array, " b"]
"""One loss per image."""
Metrics = dict[str, Float[Array, " b"]]
"""Values to log, one per image: the noise level "sigma", N as "levels" for an objective with a curriculum, and more."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The functions without their parameters: hashable, a static argument of jit."""

    student: ConsistencyFunction
    """The function to train; the target has the same one."""
    teacher: ConsistencyFunction | None = None
    """A pretrained denoiser, for distillation."""


class Batch(NamedTuple):
    """Clean images in [-1, 1], and labels for a class-conditional network."""

    images: Images
    labels: Labels | None = None


class FrozenParams(NamedTuple):
    """Parameters that an objective uses and does not train."""

    target: Params | None = None
    """Of the target f^-; None: the student's own (iCT, ECT; equal to mu = 0)."""
    teacher: Params | None = None
    """Of models.teacher."""
    perceptual: Params | None = None
    """Of a distance with weights (LPIPS)."""


class Inputs(NamedTuple):
    """The inputs of one evaluation of an objective, and its functions (x, sigma) -> images for the batch."""

    models: Models
    params: Params
    frozen: FrozenParams
    batch: Batch
    noise: Images
    """Standard normal, one image per image of the batch."""
    level_keys: Keys
    dropout_keys: Keys
    step: Step

    def student(self) -> Denoiser:
        return self.models.student.denoiser(self.params, self.batch.labels, self.dropout_keys)

    def target(self) -> Denoiser:
        """f^-, with the dropout masks of the student."""
        params = self.params if self.frozen.target is None else self.frozen.target
        return self.models.student.denoiser(params, self.batch.labels, self.dropout_keys)

    def teacher(self) -> Denoiser:
        """The teacher without dropout. Raises InputError if it is missing."""
        function, params = self.teacher_function()
        return function.denoiser(params, self.batch.labels)

    def teacher_function(self) -> tuple[ConsistencyFunction, Params]:
        """The teacher and its parameters. Raises InputError if either is missing."""
        if self.models.teacher is None or self.frozen.teacher is None:
            raise InputError("This objective needs a teacher: give a denoiser and its parameters as well.")
        return self.models.teacher, self.frozen.teacher


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """objective(models, params, frozen, batch, keys, step) -> losses and metrics, per image.

    Its fields are the method's hyper-parameters; sigma_min, sigma_max, rho and sigma_data are the models'. `keys` has
    one key per image, for its noise level, noise and dropout. `step` is the number k of steps taken and may be traced.
    Call `check(models)` once before.
    """

    adaptive: AdaptiveWeight | None = dataclasses.field(default=None, kw_only=True)
    """A learned weight w, which makes each loss e^w loss - w."""

    has_target: ClassVar[bool] = False
    """Whether it uses frozen.target."""
    has_teacher: ClassVar[bool] = False
    """Whether it requires models.teacher and frozen.teacher."""
    makes_denoiser: ClassVar[bool] = False
    """Whether it trains a denoiser D, which needs many sampling steps, instead of a consistency function."""
    replaces_teacher: ClassVar[bool] = False
    """Whether the student becomes the teacher each time that curriculum(step) changes."""

    @property
    def curriculum(self) -> Curriculum | None:
        """N(k); None for an objective on continuous noise levels."""
        return None

    @property
    def distance(self) -> Distance | None:
        """The distance d between images; None for an objective without one."""
        return None

    @property
    def final_num_levels(self) -> int | None:
        """N of the trained consistency function, from the curriculum; None where the objective does not define it."""
        return None if self.curriculum is None or self.makes_denoiser else self.curriculum.final

    def __call__(
        self, models: Models, params: Params, frozen: FrozenParams, batch: Batch, keys: Keys, step: Step
    ) -> tuple[Losses, Metrics]:
        key_level, key_noise, key_dropout = split_keys(keys)
        noise = normal_per_image(key_noise, batch.images.shape[1:])
        target = frozen.target if self.has_target and frozen.target is not None else params
        teacher = None if frozen.teacher is None else without_weight(frozen.teacher)
        frozen = frozen._replace(target=without_weight(target), teacher=teacher)
        inputs = Inputs(models, without_weight(params), frozen, batch, noise, key_level, key_dropout, step)
        losses, metrics = self.evaluate(inputs)
        if self.adaptive is None:
            return losses, metrics
        weight = self.adaptive(params, models.student.preconditioning.c_noise(metrics["sigma"]))
        return jnp.exp(weight) * losses - weight, metrics | {"unweighted": losses, "log_weight": weight}

    @abc.abstractmethod
    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        """Losses and metrics without the learned weight."""

    def check(self, models: Models) -> None:
        """Raise InputError for models that it cannot train."""
        if not self.has_teacher:
            return
        if models.teacher is None:
            raise InputError(f"{type(self).__name__} needs a teacher: give a denoiser as well.")
        student, teacher = models.student.network, models.teacher.network
        if (student.image_shape, student.classes) != (teacher.image_shape, teacher.classes):
            raise InputError(
                f"Student and teacher need the same images and classes; got {student.image_shape} with "
                f"{student.classes} classes and {teacher.image_shape} with {teacher.classes}."
            )

    def extras(self) -> Params:
        """Initial parameters that it trains in addition to the network's, as further branches of the same tree."""
        return {} if self.adaptive is None else self.adaptive.initialize()


class DistanceObjective(Objective, abc.ABC):
    """An objective that compares images: w(t, r) d(estimate, target)."""

    weighting: AnyWeighting
    distance: AnyDistance  # type: ignore[override]  # subclasses are dataclasses, and have it as a field

    def weighted_distance(
        self, t: Sigmas, r: Sigmas, estimate: Images, target: Images, perceptual: Params | None, sigma_data: float
    ) -> Losses:
        """`perceptual`: weights of the distance. `sigma_data`: standard deviation of the clean data."""
        return self.weighting(t, r, sigma_data) * self.distance.with_weights(perceptual)(estimate, target)


class PairObjective(DistanceObjective, abc.ABC):
    """w(t, r) d(f(x_t, t), f^-(x_r, r)) for noise levels t > r; subclasses define t, r and x_r.

    x_t = x + t z with standard normal noise z. f and f^- share the dropout mask, and f^- has no gradient.
    """

    has_target: ClassVar[bool] = True

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        t, r, metrics = self.sample_pair(inputs.level_keys, inputs.models.student.schedule, inputs.step)
        losses = self.losses(
            inputs.student(),
            inputs.target(),
            inputs.batch.images,
            t,
            r,
            inputs.noise,
            teacher=inputs.teacher() if self.has_teacher else None,
            perceptual=inputs.frozen.perceptual,
            sigma_data=inputs.models.student.preconditioning.sigma_data,
        )
        return losses, {"sigma": t, **metrics}

    def losses(
        self,
        student: Denoiser,
        target: Denoiser,
        images: Images,
        t: Sigmas,
        r: Sigmas,
        noise: Images,
        *,
        teacher: Denoiser | None = None,
        perceptual: Params | None = None,
        sigma_data: float = 0.5,
    ) -> Losses:
        x_t = images + per_image(t) * noise
        x_r = self.x_r(teacher, images, noise, x_t, t, r)
        estimate, held = student(x_t, t), jax.lax.stop_gradient(target(x_r, r))
        return self.weighted_distance(t, r, estimate, held, perceptual, sigma_data)

    @abc.abstractmethod
    def sample_pair(self, keys: Keys, schedule: KarrasSchedule, step: Step) -> tuple[Sigmas, Sigmas, Metrics]:
        """t, r, and metrics in addition to "sigma"."""

    def x_r(self, teacher: Denoiser | None, images: Images, noise: Images, x_t: Images, t: Sigmas, r: Sigmas) -> Images:
        """The point at level r on the trajectory of x_t. Without a teacher it is x + r z."""
        del teacher, x_t, t
        return images + per_image(r) * noise


class AdjacentPairObjective(PairObjective, abc.ABC):
    """A PairObjective with adjacent levels t = s_i and r = s_{i+1} of the schedule's N(k) levels."""

    curriculum: AnyCurriculum  # type: ignore[override]  # subclasses are dataclasses, and have it as a field
    noise_distribution: AnyIndexDistribution

    def sample_pair(self, keys: Keys, schedule: KarrasSchedule, step: Step) -> tuple[Sigmas, Sigmas, Metrics]:
        num_levels = self.curriculum(step)
        index = self.noise_distribution(keys, schedule, num_levels)
        t, r = schedule.sigma(index, num_levels), schedule.sigma(index + 1, num_levels)
        return t, r, {"levels": jnp.full_like(t, num_levels)}


def require_forward_derivatives(objective: Objective, function: ConsistencyFunction) -> None:
    """Raise InputError for a network without them."""
    attention = function.network.attention
    if attention != "plain":
        raise InputError(
            f"{type(objective).__name__} needs forward derivatives, which fused attention does not have; the network's "
            f'is {attention!r}. Use dataclasses.replace(network, attention="plain").'
        )


class SampleKeys(NamedTuple):
    """One key per image for each use of random numbers."""

    level: Keys
    noise: Keys
    dropout: Keys


def split_keys(keys: Keys) -> SampleKeys:
    """Three keys per image."""
    return SampleKeys(*jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys))
