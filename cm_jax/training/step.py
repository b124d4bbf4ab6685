"""One pure training step: (state, constants, batch, key) -> (state, metrics)."""

import dataclasses
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
from cm_jax.training.state import Constants, StepBatch, TrainState, zero_counter
from cm_jax.types import Images, Keys, Params

Metrics = dict[str, Float[Array, "..."]]
"""Metrics, and arrays over the noise-level bands."""
Curves = dict[str, Float[Array, "steps ..."]]

_FLIP = 3
"""Folded into an image's key for the flip; objectives split the key itself."""
_BANDS = (0.03, 0.4, 5.0)
"""Boundaries of the noise-level bands of the logged losses."""
LOSS_BY_BAND = "loss_sigma"
"""Name of the mean losses by noise-level band, [bands]."""
_SHARE, _SUM = "share_by_band", "loss_sum_by_band"


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """Components of a step, in the order in which they act."""

    objective: Objective
    models: Models
    optimizer: Optimizer
    emas: tuple[EMA, ...] = ()
    target_ema: TargetEMA | None = None
    """mu(k); None: the target network is the student with stopped gradient."""
    grad_accum_steps: int = 1
    """Microbatches whose gradients are averaged."""
    flip: bool = True
    """Flip every image horizontally with probability 1/2."""

    def initial_state(self, params: Params, teacher: Params | None = None) -> TrainState:
        """State before the first step. `teacher` is kept only if it changes during training."""
        trained = {**params, **self.objective.extras()}
        return TrainState(
            batches=zero_counter(),
            skipped=zero_counter(),
            consecutive_skips=zero_counter(),
            params=trained,
            optimizer=self.optimizer.transformation().init(trained),
            target=trained if self.objective.has_target and self.target_ema is not None else None,
            teacher=teacher if self.objective.replaces_teacher else None,
            ema={ema.name: trained for ema in self.emas},
        )

    def run_steps(
        self, parallelism: Parallelism, state: TrainState, constants: Constants, batches: StepBatch, key: Key[Array, ""]
    ) -> tuple[TrainState, Curves]:
        """One step for each of `batches` [steps, b, ...]; metrics [steps]."""

        def one(state: TrainState, batch: StepBatch) -> tuple[TrainState, Metrics]:
            return self(state, constants, batch, key, parallelism)

        return parallelism.scan(one, state, batches)

    def __call__(
        self,
        state: TrainState,
        constants: Constants,
        batch: StepBatch,
        key: Key[Array, ""],
        parallelism: Parallelism,
    ) -> tuple[TrainState, Metrics]:
        """One step. `batch` is this device's share of the global batch; `key` is the same for the whole run."""
        count = jax.tree.leaves(batch)[0].shape[0]
        keys = image_keys(key, state.batches, parallelism.image_indices(count))
        teacher = constants.teacher if state.teacher is None else state.teacher
        frozen = FrozenParams(parallelism.gather(state.target), parallelism.gather(teacher), constants.perceptual)
        clean = load_batch(batch, constants, keys if self.flip else None)
        gradients, metrics = self._gradients(
            parallelism, frozen, state.step, parallelism.gather(state.params), clean, keys
        )
        gradients, metrics = parallelism.mean((gradients, metrics))
        gradients = parallelism.shard(gradients)
        metrics |= {"gradient_norm": optax.tree.norm(gradients)}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

        updated = self._apply_gradients(state, gradients)
        skipped = state._replace(skipped=state.skipped + 1, consecutive_skips=state.consecutive_skips + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, skipped)
        state = state._replace(batches=state.batches + 1)
        return state, mean_by_band(metrics) | {
            "skipped": state.skipped.astype(jnp.float32),
            "consecutive_skips": state.consecutive_skips.astype(jnp.float32),
        }

    def _gradients(
        self, parallelism: Parallelism, frozen: FrozenParams, step: Any, params: Params, batch: Batch, keys: Keys
    ) -> tuple[Params, Metrics]:
        """Mean gradient and mean metrics of this device's images."""

        def loss(params: Params, batch: Batch, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
            losses, metrics = self.objective(self.models, params, frozen, batch, keys, step)
            return losses.mean(), means(losses, metrics)

        gradient = jax.grad(loss, has_aux=True)
        count = self.grad_accum_steps
        if count == 1:
            return gradient(params, batch, keys)

        # Microbatch j has images j, j + count, ..., so that images stay on their device.
        microbatches = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0), (batch, keys))

        def add(total: Any, microbatch: tuple[Batch, Keys]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

        first = jax.tree.map(lambda a: a[0], microbatches)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, params, *first))
        total, _ = parallelism.scan(add, zeros, microbatches)
        return jax.tree.map(lambda a: a / count, total)

    def _apply_gradients(self, state: TrainState, gradients: Params) -> TrainState:
        """State after a step with finite gradients, except for the number of batches."""
        step = state.step
        updates, optimizer = self.optimizer.transformation().update(gradients, state.optimizer, state.params)
        params: Params = optax.apply_updates(state.params, updates)  # type: ignore[assignment]
        state = state._replace(
            consecutive_skips=jnp.zeros_like(state.consecutive_skips),
            params=params,
            optimizer=optimizer,
            ema={ema.name: ema_update(state.ema[ema.name], params, ema.decay_at(step)) for ema in self.emas},
        )
        if state.target is not None and self.target_ema is not None:
            decay = self.target_ema(step, self.objective.curriculum)
            state = state._replace(target=ema_update(state.target, params, decay))
        return self._replace_teacher(state, step) if self.objective.replaces_teacher else state

    def _replace_teacher(self, state: TrainState, step: Any) -> TrainState:
        """At the end of a stage of progressive distillation: the student becomes the teacher, the rest is reset."""
        curriculum = self.objective.curriculum
        assert curriculum is not None
        reset = state._replace(
            teacher=state.params,
            optimizer=self.optimizer.transformation().init(state.params),
            ema=dict.fromkeys(state.ema, state.params),
        )
        stage_ends = curriculum(step + 1) != curriculum(step)
        return jax.tree.map(lambda new, old: jnp.where(stage_ends, new, old), reset, state)


def image_keys(key: Key[Array, ""], batch: Any, indices: Any) -> Keys:
    """One key per image: fold_in(fold_in(key, k), i) for image i of batch k."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, batch), indices)


def load_batch(batch: StepBatch, constants: Constants, flip_keys: Keys | None) -> Batch:
    """Float images in [-1, 1], flipped at random if `flip_keys` are given, from bytes or from a resident data set."""
    if batch.indices is None:
        images, labels = batch.images, batch.labels
    else:
        assert constants.images is not None
        images = constants.images[batch.indices]
        labels = None if constants.labels is None else constants.labels[batch.indices]
    clean: Images = jnp.asarray(images, jnp.float32) / 127.5 - 1
    if flip_keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(flip_keys, _FLIP)
        flips = jax.vmap(jax.random.bernoulli)(keys)
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
