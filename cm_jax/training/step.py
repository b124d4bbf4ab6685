"""One training step, pure: (state, constants, batch, key) -> (state, metrics)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from cm_jax.diffusion.curricula import TargetEMA
from cm_jax.objectives import Batch, FrozenParams, Models, Objective
from cm_jax.training.ema import EMA, ema_update
from cm_jax.training.optimizers import Optimizer
from cm_jax.training.parallelism import Parallelism
from cm_jax.training.state import Constants, RawBatch, TrainState, fresh_counter
from cm_jax.types import Images, Keys, Params

Metrics = dict[str, Float[Array, "..."]]
"""Metrics, and arrays over the noise-level bands."""
Curves = dict[str, Float[Array, "steps ..."]]

_FLIP = 3
"""What of an image's key decides whether it is mirrored; objectives split the key itself."""
_BANDS = (0.03, 0.4, 5.0)
"""Boundaries of the noise-level bands of the logged losses."""
LOSS_BY_BAND = "loss_sigma"
"""Name of the mean losses by noise-level band, [bands]."""
_SHARE, _SUM = "share_by_band", "loss_sum_by_band"


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """What is trained, and how. Each field is a component of its own; this is the order in which they act."""

    objective: Objective
    models: Models
    optimizer: Optimizer
    averages: tuple[EMA, ...] = ()
    target: TargetEMA | None = None
    """mu(k); None: the target is the student itself, held fixed."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, to save memory; their gradients are averaged."""
    flip: bool = True
    """Mirror every image with probability 1/2."""

    def initial(self, params: Params, teacher: Params | None = None) -> TrainState:
        """The state before the first step. `teacher` is kept only where it changes on the way."""
        trained = {**params, **self.objective.extras()}
        return TrainState(
            batches=fresh_counter(),
            skipped=fresh_counter(),
            skipped_in_a_row=fresh_counter(),
            params=trained,
            optimizer=self.optimizer.transformation().init(trained),
            target=trained if self.objective.has_target and self.target is not None else None,
            teacher=teacher if self.objective.hands_over else None,
            averages={average.name: trained for average in self.averages},
        )

    def many(
        self, across: Parallelism, state: TrainState, constants: Constants, batches: RawBatch, key: Key[Array, ""]
    ) -> tuple[TrainState, Curves]:
        """A step for each of `batches` [steps, b, ...]; metrics [steps]."""

        def one(state: TrainState, batch: RawBatch) -> tuple[TrainState, Metrics]:
            return self(state, constants, batch, key, across)

        return across.scan(one, state, batches)

    def __call__(
        self,
        state: TrainState,
        constants: Constants,
        batch: RawBatch,
        key: Key[Array, ""],
        across: Parallelism,
    ) -> tuple[TrainState, Metrics]:
        """One step. `batch` is what this device has of the global batch, and `key` is the run's."""
        count = jax.tree.leaves(batch)[0].shape[0]
        keys = image_keys(key, state.batches, across.image_numbers(count))
        teacher = constants.teacher if state.teacher is None else state.teacher
        frozen = FrozenParams(across.whole(state.target), across.whole(teacher), constants.perceptual)
        clean = fetched(batch, constants, keys if self.flip else None)
        gradient = functools.partial(self._gradient, across, frozen, state.step)
        gradients, metrics = gradient(across.whole(state.params), clean, keys)
        gradients, metrics = across.mean((gradients, metrics))
        gradients = across.split(gradients)
        metrics |= {"gradient_norm": optax.tree.norm(gradients)}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

        after = self._moved(state, gradients)
        skipped = state._replace(skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, skipped)
        state = state._replace(batches=state.batches + 1)
        return state, mean_by_band(metrics) | {
            "skipped": state.skipped.astype(jnp.float32),
            "skipped_in_a_row": state.skipped_in_a_row.astype(jnp.float32),
        }

    def _gradient(
        self, across: Parallelism, frozen: FrozenParams, step: Any, params: Params, batch: Batch, keys: Keys
    ) -> tuple[Params, Metrics]:
        """The mean gradient and mean metrics of the images at hand."""

        def loss(params: Params, batch: Batch, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
            losses, metrics = self.objective(self.models, params, frozen, batch, keys, step)
            return losses.mean(), means(losses, metrics)

        gradient = jax.grad(loss, has_aux=True)
        if self.accumulate == 1:
            return gradient(params, batch, keys)

        # Part j has images j, j + accumulate, ...: those that lie on a device stay on it.
        parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, self.accumulate, *a.shape[1:]), 1, 0), (batch, keys))

        def add(total: Any, part: tuple[Batch, Keys]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, params, *first))
        total, _ = across.scan(add, zeros, parts)
        return jax.tree.map(lambda a: a / self.accumulate, total)

    def _moved(self, state: TrainState, gradients: Params) -> TrainState:
        """The state after a step with finite gradients, but for the number of batches."""
        step = state.step
        updates, optimizer = self.optimizer.transformation().update(gradients, state.optimizer, state.params)
        params: Params = optax.apply_updates(state.params, updates)  # type: ignore[assignment]
        after = state._replace(
            skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
            params=params,
            optimizer=optimizer,
            averages={
                average.name: ema_update(state.averages[average.name], params, average.rate(step))
                for average in self.averages
            },
        )
        if state.target is not None and self.target is not None:
            after = after._replace(
                target=ema_update(state.target, params, self.target(step, self.objective.curriculum))
            )
        return self._handed_over(after, step) if self.objective.hands_over else after

    def _handed_over(self, state: TrainState, step: Any) -> TrainState:
        """At the end of a stage of progressive distillation the student becomes the teacher, and all else is fresh."""
        curriculum = self.objective.curriculum
        assert curriculum is not None
        fresh = state._replace(
            teacher=state.params,
            optimizer=self.optimizer.transformation().init(state.params),
            averages=dict.fromkeys(state.averages, state.params),
        )
        over = curriculum(step + 1) != curriculum(step)
        return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, state)


def image_keys(key: Key[Array, ""], batch: Any, numbers: Any) -> Keys:
    """A key for each image: that of image i in batch k is fold_in(fold_in(key, k), i)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, batch), numbers)


def fetched(batch: RawBatch, constants: Constants, flip_keys: Keys | None) -> Batch:
    """Float images in [-1, 1], some of them mirrored, from bytes or from numbers in the data set on the devices."""
    if batch.numbers is None:
        images, labels = batch.images, batch.labels
    else:
        assert constants.images is not None
        images = constants.images[batch.numbers]
        labels = None if constants.labels is None else constants.labels[batch.numbers]
    clean: Images = jnp.asarray(images, jnp.float32) / 127.5 - 1
    if flip_keys is not None:
        sources = jax.vmap(jax.random.fold_in, (0, None))(flip_keys, _FLIP)
        flips = jax.vmap(jax.random.bernoulli)(sources)
        clean = jnp.where(flips[:, None, None, None], clean[:, :, ::-1], clean)
    return Batch(clean, None if labels is None else jnp.asarray(labels))


def means(losses: Float[Array, " b"], metrics: dict[str, Float[Array, " b"]]) -> Metrics:
    """Means over images. With noise levels, also the share of images and the sum of losses in each band, [bands]."""
    averaged = {"loss": losses.mean(), **{name: values.mean() for name, values in metrics.items()}}
    if "sigma" in metrics:
        band = jnp.searchsorted(jnp.asarray(_BANDS), metrics["sigma"])
        in_band = band == jnp.arange(len(_BANDS) + 1)[:, None]
        averaged[_SHARE] = in_band.mean(1, dtype=jnp.float32)
        averaged[_SUM] = jnp.where(in_band, losses, 0).mean(1)
    return averaged


def mean_by_band(metrics: Metrics) -> Metrics:
    """Mean losses by noise-level band in place of sums and shares; NaN for a band without images."""
    rest = {name: value for name, value in metrics.items() if name not in (_SHARE, _SUM)}
    return rest | ({LOSS_BY_BAND: metrics[_SUM] / metrics[_SHARE]} if _SHARE in metrics else {})


def columns(metrics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics [steps] and [steps, bands] as columns [steps]; the number of a band ends a column's name."""
    bands = metrics.get(LOSS_BY_BAND, np.empty((0, 0)))
    rest = {name: values for name, values in metrics.items() if name != LOSS_BY_BAND}
    return rest | {f"{LOSS_BY_BAND}_{index}": values for index, values in enumerate(bands.T)}
