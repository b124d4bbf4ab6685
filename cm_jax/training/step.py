"""One pure training step, (state, constants, batch, key) -> (state, metrics), with its state, constants and batches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from cm_jax.data.augmentation import Augmentation
from cm_jax.diffusion.curricula import Step, TargetEMA
from cm_jax.diffusion.guidance import no_labels
from cm_jax.objectives import Batch, FrozenParams, Models, Objective
from cm_jax.parallelism import Parallelism
from cm_jax.training.ema import AnyEMA, ema_update
from cm_jax.training.optimizers import Optimizer
from cm_jax.types import Images, Keys, Labels, Network, Params

Counter = Int[Array, ""]
Metrics = dict[str, Float[Array, "..."]]
"""Metrics, and arrays over the noise-level bands."""
Curves = dict[str, Float[Array, "steps ..."]]

_FLIP, _LABEL, _AUGMENTATION = 3, 4, 6
"""Folded into an image's key for the flip, label dropout and augmentation; objectives split it, and fold in 5."""
_BANDS = (0.03, 0.4, 5.0)
"""Boundaries of the noise-level bands of the logged losses."""
LOSS_BY_BAND = "loss_sigma"
"""Name of the mean losses by noise-level band, [bands]; NaN for a band without images."""
_SHARE, _SUM = "share_by_band", "loss_sum_by_band"


class TrainState(NamedTuple):
    """Everything that a step changes: a tree of arrays. Components that a method does not use are None."""

    batches: Counter
    """Batches seen: the position in the data and in the stream of random numbers."""
    skipped: Counter
    """Batches that were skipped because their gradients were not finite."""
    consecutive_skips: Counter
    params: Params
    """Float32 parameters of the student, whatever its compute precision."""
    optimizer: Any
    target: Params | None
    """Target network f^-; None if it is the student."""
    teacher: Params | None
    """Teacher that changes during training (progressive distillation); a fixed one is in Constants."""
    ema: dict[str, Params]

    @property
    def step(self) -> Counter:
        """k: optimizer steps taken."""
        return self.batches - self.skipped


class Constants(NamedTuple):
    """Arrays that every step reads and none changes; copied to the devices once."""

    teacher: Params | None = None
    perceptual: Params | None = None
    """Weights of a perceptual distance (LPIPS)."""
    images: Array | np.ndarray | None = None
    """Whole data set, if it is resident on the devices: uint8 [n, h, w, c]."""
    labels: Array | np.ndarray | None = None


class StepBatch(NamedTuple):
    """uint8 images [b, h, w, c] and labels [b], or indices [b] into a data set that is resident on the devices."""

    images: Array | np.ndarray | None = None
    labels: Array | np.ndarray | None = None
    indices: Array | np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """Components of a step, in the order in which they act."""

    objective: Objective
    models: Models
    optimizer: Optimizer
    emas: tuple[AnyEMA, ...] = ()
    target_ema: TargetEMA | None = None
    """mu(k); None: the target network is the student with stopped gradient."""
    grad_accum_steps: int = 1
    """Microbatches whose gradients are averaged."""
    flip: bool = True
    """Flip every image horizontally with probability 1/2."""
    augmentation: Augmentation | None = None
    """Augmentation whose parameters the student takes as input."""
    label_dropout: float = 0.0
    """Probability of replacing an image's label by that of no label."""

    def initial_state(self, params: Params, teacher: Params | None = None) -> TrainState:
        """State before the first step. `teacher` is kept only if it changes during training."""
        zero, params = jnp.int32(0), {**params, **self.objective.extras()}
        optimizer, ema = self.optimizer.transformation().init(params), {ema.name: params for ema in self.emas}
        target = self.initial_target(params)
        teacher = teacher if self.objective.replaces_teacher else None
        return TrainState(zero, zero, zero, params, optimizer, target, teacher, ema)

    def initial_target(self, params: Params) -> Params | None:
        """The target network that starts as the student; None if it is the student."""
        return params if self.objective.has_target and self.target_ema is not None else None

    def run_steps(
        self, parallelism: Parallelism, state: TrainState, constants: Constants, batches: StepBatch, key: Key[Array, ""]
    ) -> tuple[TrainState, Curves]:
        """One step for each of `batches` [steps, b, ...]; metrics [steps]."""
        return parallelism.scan(lambda state, batch: self(state, constants, batch, key, parallelism), state, batches)

    def __call__(
        self, state: TrainState, constants: Constants, batch: StepBatch, key: Key[Array, ""], parallelism: Parallelism
    ) -> tuple[TrainState, Metrics]:
        """One step. `batch` is this device's share of the global batch; `key` is the same for the whole run."""
        state = state._replace(params=self.models.student.network.constrain(state.params))
        keys = image_keys(key, state.batches, parallelism.image_indices(len(jax.tree.leaves(batch)[0])))
        teacher = constants.teacher if state.teacher is None else state.teacher
        frozen = FrozenParams(parallelism.gather(state.target), parallelism.gather(teacher), constants.perceptual)
        clean = load_batch(batch, constants, keys if self.flip else None)
        if clean.labels is not None and self.label_dropout:
            labels = drop_labels(clean.labels, keys, self.label_dropout, self.models.student.network)
            clean = clean._replace(labels=labels)
        if self.augmentation is not None:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, _AUGMENTATION)
            images, parameters = self.augmentation(clean.images, own)
            clean = clean._replace(images=images, augmentation=parameters)

        def loss(params: Params, batch: Batch, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
            losses, metrics = self.objective(self.models, params, frozen, batch, keys, state.step)
            return losses.mean(), means(losses, metrics)

        gradient = functools.partial(jax.grad(loss, has_aux=True), parallelism.gather(state.params))
        gradients, metrics = parallelism.mean(self._accumulate(gradient, (clean, keys), parallelism))
        gradients = parallelism.shard(gradients)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

        updated = self._apply_gradients(state, gradients)
        skipped = state._replace(skipped=state.skipped + 1, consecutive_skips=state.consecutive_skips + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, skipped)
        metrics[LOSS_BY_BAND] = metrics.pop(_SUM) / metrics.pop(_SHARE)
        return state._replace(batches=state.batches + 1), metrics | {
            "skipped": state.skipped.astype(jnp.float32),
            "consecutive_skips": state.consecutive_skips.astype(jnp.float32),
        }

    def _accumulate(
        self, gradient: Callable[..., Any], images: tuple[Batch, Keys], parallelism: Parallelism
    ) -> tuple[Params, Metrics]:
        """Mean over microbatches of the gradient and the metrics."""
        count = self.grad_accum_steps
        if count == 1:
            return gradient(*images)

        # Microbatch j has images j, j + count, ..., so that images stay on their device.
        microbatches = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0), images)

        def add(total: Any, microbatch: tuple[Batch, Keys]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(*microbatch)), None

        first = jax.tree.map(lambda a: a[0], microbatches)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, *first))
        total, _ = parallelism.scan(add, zeros, microbatches)
        return jax.tree.map(lambda a: a / count, total)

    def _apply_gradients(self, state: TrainState, gradients: Params) -> TrainState:
        """State after a step with finite gradients, except for the number of batches."""
        step, transformation, curriculum = state.step, self.optimizer.transformation(), self.objective.curriculum
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params: Params = optax.apply_updates(state.params, updates)  # type: ignore[assignment]
        emas = {ema.name: ema_update(state.ema[ema.name], params, ema.weight_at(step)) for ema in self.emas}
        target = state.target
        if target is not None and self.target_ema is not None:
            target = ema_update(target, params, 1 - self.target_ema(step, curriculum))
        state = state._replace(
            consecutive_skips=jnp.int32(0), params=params, optimizer=optimizer, target=target, ema=emas
        )
        if not self.objective.replaces_teacher:
            return state
        # At the end of a stage of progressive distillation, the student becomes the teacher, and the rest is reset.
        assert curriculum is not None
        optimizer, emas = transformation.init(params), dict.fromkeys(emas, params)
        reset = state._replace(teacher=params, optimizer=optimizer, ema=emas)
        stage_ends = curriculum(step + 1) != curriculum(step)
        return jax.tree.map(lambda new, old: jnp.where(stage_ends, new, old), reset, state)


def image_keys(key: Key[Array, ""], batch: Step, indices: Int[Array | np.ndarray, " b"]) -> Keys:
    """One key per image: fold_in(fold_in(key, k), i) for image i of batch k."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, batch), indices)


def load_batch(batch: StepBatch, constants: Constants, flip_keys: Keys | None) -> Batch:
    """Float images in [-1, 1], flipped at random if `flip_keys` are given, from bytes or from a resident data set."""
    images, labels = batch.images, batch.labels
    if batch.indices is not None:
        assert constants.images is not None
        images = constants.images[batch.indices]
        labels = None if constants.labels is None else constants.labels[batch.indices]
    clean: Images = jnp.asarray(images, jnp.float32) / 127.5 - 1
    if flip_keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(flip_keys, _FLIP)
        clean = jnp.where(jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None], clean[:, :, ::-1], clean)
    return Batch(clean, None if labels is None else jnp.asarray(labels))


def drop_labels(labels: Labels, keys: Keys, rate: float, network: Network) -> Labels:
    """Labels, replaced by that of no label with probability `rate`; one key per image."""
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, _LABEL)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(own)
    return jnp.where(dropped, no_labels(network, labels), labels)


def means(losses: Float[Array, " b"], metrics: dict[str, Float[Array, " b"]]) -> Metrics:
    """Means over images; the share of images and the sum of losses in each noise-level band, [bands]."""
    band = jnp.searchsorted(jnp.asarray(_BANDS), metrics["sigma"])
    in_band = band == jnp.arange(len(_BANDS) + 1)[:, None]
    by_band = {_SHARE: in_band.mean(1, dtype=jnp.float32), _SUM: jnp.where(in_band, losses, 0).mean(1)}
    return {name: values.mean() for name, values in {"loss": losses, **metrics}.items()} | by_band


def columns(metrics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics [steps] and [steps, bands] as columns [steps]; the number of a band ends a column's name."""
    rest = {name: values for name, values in metrics.items() if name != LOSS_BY_BAND}
    return rest | {f"{LOSS_BY_BAND}_{index}": values for index, values in enumerate(metrics[LOSS_BY_BAND].T)}
