"""The interface of objectives, and the loss on pairs of noise levels."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.curricula import AnyCurriculum, Curriculum, Progressive, Step
from cm_jax.diffusion.guidance import AnyGuidance, UniformGuidance, guided, no_labels
from cm_jax.diffusion.losses import AnyWeighting, Distance, Squared, Uniform
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution, UniformIndex
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.objectives.adaptive_weight import AdaptiveWeight, without_weight
from cm_jax.objectives.distances import AnyDistance
from cm_jax.types import Denoiser, Images, Keys, Labels, Params, Sigmas, normal_per_image, per_image, split_keys

_GUIDANCE = 5  # folded into an image's key for its guidance strength
Losses = Float[Array, " b"]  # one per image
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
    """Clean images in [-1, 1], labels for a class-conditional network, parameters of the images' augmentation."""

    images: Images
    labels: Labels | None = None
    augmentation: Float[Array, "b a"] | None = None


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
    target_params: Params
    teacher_params: Params | None
    batch: Batch
    noise: Images
    """Standard normal, one image per image of the batch."""
    level_keys: Keys
    dropout_keys: Keys
    step: Step
    guidance: Sigmas | None = None
    """Strength of the teacher's guidance for every image."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the clean data."""
        return self.models.student.preconditioning.sigma_data

    @property
    def student_guidance(self) -> Sigmas | None:
        """The strengths that the student's network takes as input."""
        return self.guidance if self.models.student.network.guidance_embedding else None

    def student(self) -> Denoiser:
        return self._student(self.params)

    def target(self) -> Denoiser:
        """f^-, with the dropout masks of the student."""
        return self._student(self.target_params)

    def _student(self, params: Params) -> Denoiser:
        inputs = self.batch.labels, self.dropout_keys, self.student_guidance, self.batch.augmentation
        return self.models.student.denoiser(params, *inputs)

    def teacher(self) -> Denoiser:
        """The teacher without dropout, with guidance. Raises InputError if it is missing."""
        function, params = self.teacher_function()
        return self.guided(lambda labels: function.denoiser(params, labels, augmentation=self.teacher_augmentation))

    @property
    def teacher_augmentation(self) -> Float[Array, "b a"] | None:
        """The parameters of the images' augmentation, if the teacher's network takes them as input."""
        return self.batch.augmentation if getattr(self.teacher_function()[0].network, "augment_dim", 0) else None

    def guided(self, teacher: Callable[[Labels | None], Denoiser]) -> Denoiser:
        """teacher(labels), guided by itself without labels if the objective has guidance."""
        if self.guidance is None:
            return teacher(self.batch.labels)
        unlabeled = no_labels(self.teacher_function()[0].network, self.batch.labels)
        return guided(teacher(self.batch.labels), teacher(unlabeled), self.guidance)

    def teacher_function(self) -> tuple[ConsistencyFunction, Params]:
        """The teacher and its parameters. Raises InputError if either is missing."""
        if self.models.teacher is None or self.teacher_params is None:
            raise InputError("This objective needs a teacher: give a denoiser and its parameters as well.")
        return self.models.teacher, self.teacher_params


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
    def guidance(self) -> AnyGuidance | None:
        """Strengths of the teacher's guidance by itself without labels; None: no guidance."""
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
        student, target = without_weight(params), without_weight(target)
        teacher = None if frozen.teacher is None else without_weight(frozen.teacher)
        strengths = self.guidance and self.guidance(jax.vmap(jax.random.fold_in, (0, None))(keys, _GUIDANCE))
        inputs = Inputs(models, student, target, teacher, batch, noise, key_level, key_dropout, step, strengths)
        losses, metrics = self.with_weights(frozen.perceptual).evaluate(inputs)
        if self.adaptive is None:
            return losses, metrics
        weight = self.adaptive(params, models.student.preconditioning.c_noise(metrics["sigma"]))
        return jnp.exp(weight) * losses - weight, metrics | {"unweighted": losses, "log_weight": weight}

    def with_weights(self, perceptual: Params | None) -> "Objective":
        """The same objective with these weights of its distance; itself if it has no distance."""
        if self.distance is None:
            return self
        return dataclasses.replace(self, distance=self.distance.with_weights(perceptual))

    @abc.abstractmethod
    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        """Losses and metrics without the learned weight."""

    def check(self, models: Models) -> None:
        """Raise InputError for models that it cannot train."""
        needed = isinstance(self.guidance, UniformGuidance)
        if needed != models.student.network.guidance_embedding:
            reason = "UniformGuidance needs" if needed else "Only UniformGuidance trains"
            raise InputError(f"{reason} a guidance embedding of the network: set its guidance_embedding={needed}.")
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
        if self.guidance is not None and teacher.classes is None:
            raise InputError("Guidance needs a class-conditional teacher, and this one is unconditional: leave it out.")

    def extras(self) -> Params:
        """Initial parameters that it trains in addition to the network's, as further branches of the same tree."""
        return {} if self.adaptive is None else self.adaptive.initialize()


class PairObjective(Objective, abc.ABC):
    """w(t, r) d(f(x_t, t), f^-(x_r, r)) for noise levels t > r; subclasses define t, r and x_r.

    x_t = x + t z with standard normal noise z. f and f^- share the dropout mask, and f^- has no gradient.
    """

    weighting: AnyWeighting
    """Weight w of the loss as a function of the noise levels."""
    distance: AnyDistance  # type: ignore[override]  # subclasses are dataclasses, and have it as a field
    """Distance d between images."""
    has_target: ClassVar[bool] = True

    def evaluate(self, inputs: Inputs) -> tuple[Losses, Metrics]:
        t, r, metrics = self.sample_pair(inputs.level_keys, inputs.models.student.schedule, inputs.step)
        student, target, images = inputs.student(), inputs.target(), inputs.batch.images
        teacher = inputs.teacher() if self.has_teacher else None
        losses = self.losses(student, target, images, t, r, inputs.noise, teacher=teacher, sigma_data=inputs.sigma_data)
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
        sigma_data: float = 0.5,
    ) -> Losses:
        x_t = images + per_image(t) * noise
        x_r = self.x_r(teacher, images, noise, x_t, t, r)
        estimate, held = student(x_t, t), jax.lax.stop_gradient(target(x_r, r))
        return self.weighting(t, r, sigma_data) * self.distance(estimate, held)

    @abc.abstractmethod
    def sample_pair(self, keys: Keys, schedule: KarrasSchedule, step: Step) -> tuple[Sigmas, Sigmas, Metrics]:
        """t, r, and metrics in addition to "sigma"."""

    def x_r(self, teacher: Denoiser | None, images: Images, noise: Images, x_t: Images, t: Sigmas, r: Sigmas) -> Images:
        """The point at level r on the trajectory of x_t. Without a teacher it is x + r z."""
        return images + per_image(r) * noise


@dataclasses.dataclass(frozen=True)
class AdjacentPairObjective(PairObjective, abc.ABC):
    """A PairObjective with adjacent levels t = s_i and r = s_{i+1} of the schedule's N(k) levels. Defaults: CM's."""

    curriculum: AnyCurriculum = Progressive()  # type: ignore[override]  # a field in place of the property
    """Number of noise levels N(k) at training step k."""
    noise_distribution: AnyIndexDistribution = UniformIndex()
    """Distribution of the pairs of adjacent noise levels."""
    weighting: AnyWeighting = Uniform()
    distance: AnyDistance = Squared()

    def sample_pair(self, keys: Keys, schedule: KarrasSchedule, step: Step) -> tuple[Sigmas, Sigmas, Metrics]:
        num_levels = self.curriculum(step)
        index = self.noise_distribution(keys, schedule, num_levels)
        t, r = schedule.sigma(index, num_levels), schedule.sigma(index + 1, num_levels)
        return t, r, {"levels": jnp.full_like(t, num_levels)}


def require_forward_derivatives(objective: Objective, function: ConsistencyFunction) -> None:
    """Raise InputError for a network without them."""
    if (attention := function.network.attention) != "plain":
        raise InputError(
            f"{type(objective).__name__} needs forward derivatives, which fused attention does not have; the network's "
            f'is {attention!r}. Use dataclasses.replace(network, attention="plain").'
        )
