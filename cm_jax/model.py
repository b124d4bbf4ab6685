"""Class Model: denoise, sample, edit, interpolate, save."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.editing import (
    EDIT_STEPS,
    Operator,
    Strokes,
    blends,
    checked_images,
    edit_all,
    slerp_all,
    stroke_sigmas,
    variant_keys,
)
from cm_jax.errors import InputError, check_int
from cm_jax.samplers import SAMPLERS, Sampler, choose_levels
from cm_jax.samplers.generation import default_batch_size, draw_labels, generate, replay
from cm_jax.types import Keys, Params

Label = int | str
"""A class by number or by name."""

TEACHER_STEPS = 40
"""Steps of a denoiser where none are asked for: the original's default."""


class Plan(NamedTuple):
    """How images are drawn."""

    sampler: Sampler
    levels: tuple[float, ...]
    """Falling; the last one closes, and the network is not called there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A consistency function (or a denoiser) with its parameters, ready to be called."""

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)

    def denoise(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        sigma: float | Float[Array | np.ndarray, "*b"],
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """f(images, sigma, labels), or D for a model with EDM scalings: the clean images that it sees in noisy ones.

        images: NHWC float32, clean images in [-1, 1] plus noise of standard deviation sigma. sigma: one level for all,
        or one per image. labels: classes by number or name, one for all or one per image; None for an unconditional
        model. Returns float32 of the same shape. Raises InputError for anything else.
        """
        x = jnp.asarray(images, jnp.float32)
        levels = np.asarray(sigma, np.float32)
        self.config.network.check_input(x.shape, labels is not None)
        if levels.shape not in ((), (x.shape[0],)) or not np.all(np.isfinite(levels) & (levels >= 0)):
            raise InputError(
                f"sigma must be one level or {x.shape[0]}, finite and not negative; got {np.array2string(levels)}."
            )
        chosen = None if labels is None else jnp.asarray(self.labels(labels, x.shape[0]), jnp.int32)
        return _denoise(self.config.function, self.params, x, jnp.broadcast_to(levels, x.shape[:1]), chosen)

    def sample(
        self,
        key: int | Key[Array, ""],
        count: int = 1,
        *,
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None = None,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | Sampler | None = None,
        batch_size: int | None = None,
        noise: Float[Array | np.ndarray, "draws b h w c"] | None = None,
    ) -> Float[np.ndarray, "b h w c"]:
        """`count` images, NHWC float32 in [-1, 1], from a seed or key.

        Image i depends on the key, on i and on its label, and on neither `count`, `batch_size` nor the devices.

        labels: a class by number or name for all, or one per image; None draws them from the key (see `draw_labels`).
        Levels, one of: steps, a number (tuned levels where the checkpoint has them); timesteps, as diffusers writes
        them, (22, 0); indices, as the original writes them, (0, 22, 39); sigmas, falling. None of them: one step, or
        40 for a denoiser. sampler: a name in cm_jax.samplers.SAMPLERS or a sampler; None takes `consistency`, or `heun`
        for a denoiser. batch_size: images drawn at once over all local devices. noise: recorded standard normal noise
        in place of the key's, draw 0 for the start and one per step after it. Raises InputError for anything else.
        """
        plan = self.plan(steps=steps, timesteps=timesteps, indices=indices, sigmas=sigmas, sampler=sampler)
        if noise is not None:
            return self._replayed(noise, count, labels, plan)
        return np.concatenate(list(self.batches(key, count, plan, labels=labels, batch_size=batch_size)))

    def edit(
        self,
        key: int | Key[Array, ""],
        images: Float[Array | np.ndarray, "b h w c"],
        operator: Operator,
        *,
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None = None,
        variants: int = 1,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        batch_size: int | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """`variants` edits of every image, those of an image one after the other     (CM, algorithm 4).

        operator: what is known of the images (see cm_jax.editing): Mask(known) inpaints, Luma() colours, PatchMean(8)
        sharpens; Strokes() begins at the images under the first level's noise, and Noisy() at images that have it. What
        is known stays so to 1e-6, for which values may leave [-1, 1]. labels: one for all or one per image. Levels as
        for `sample`; by default 17 steps from sigma_max, for Strokes see `stroke_sigmas`. The edit depends on the
        key, the number of its image and of the variant, and not on batches and devices. Raises InputError.
        """
        self._refuse_denoisers()
        given = checked_images(images, operator, self.config.network.image_shape)
        count = check_int("variants", variants, 1, 10**6)
        if steps is None and timesteps is None and indices is None and sigmas is None:
            sigmas = operator.default_sigmas(self.config.network.image_shape[0])
            steps = EDIT_STEPS if sigmas is None else None
        plan = self.plan(steps=steps, timesteps=timesteps, indices=indices, sigmas=sigmas)
        keys = variant_keys(_as_key(key), len(given), count)
        return self._edited(plan, operator, keys, given, self.labels(labels, len(given)), batch_size)

    def interpolate_images(
        self,
        key: int | Key[Array, ""],
        first: Float[Array | np.ndarray, "h w c"],
        second: Float[Array | np.ndarray, "h w c"],
        frames: int = 8,
        *,
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None = None,
        sigmas: Sequence[float] | None = None,
        batch_size: int | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """`frames` images from one to the other: their blends, each edited as strokes are, under the same noise.

        labels: one for all or one per frame. sigmas: as for `sample`, by default those of strokes; the first one says
        how much of the images is hidden. Raises InputError.
        """
        self._refuse_denoisers()
        frames = check_int("frames", frames, 2, 10**6)
        pair = checked_images(np.stack([first, second]), Strokes(), self.config.network.image_shape)
        plan = self.plan(sigmas=stroke_sigmas(pair.shape[1]) if sigmas is None else sigmas)
        keys = jnp.repeat(variant_keys(_as_key(key), 1, 1), frames)
        blended = blends(pair[0], pair[1], frames)
        return self._edited(plan, Strokes(), keys, blended, self.labels(labels, frames), batch_size)

    def interpolate_noise(
        self,
        first: int | Key[Array, ""],
        second: int | Key[Array, ""],
        frames: int = 8,
        *,
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None = None,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | Sampler | None = None,
        batch_size: int | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """`frames` images from the first one that `sample` draws for one key to the first one for another.

        Every draw of noise is interpolated along the sphere. labels: one for all or one per frame. The rest is as for
        `sample`. Raises InputError.
        """
        plan = self.plan(steps=steps, timesteps=timesteps, indices=indices, sigmas=sigmas, sampler=sampler)
        frames = check_int("frames", frames, 2, 10**6)
        parts = slerp_all(
            self.config.function,
            plan.sampler,
            self.params,
            plan.levels,
            _as_key(first),
            _as_key(second),
            self.labels(labels, frames),
            frames=frames,
            batch_size=self._batch_size(batch_size),
        )
        return np.concatenate(list(parts))

    def batches(
        self,
        key: int | Key[Array, ""],
        count: int,
        plan: Plan,
        *,
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Float[np.ndarray, "b h w c"]]:
        """As `sample`, a batch at a time, for more images than memory holds. Bad input raises here, not later."""
        count = check_int("count", count, 1, 10**9)
        chosen = self.draw_labels(key, count) if labels is None else self.labels(labels, count)
        return generate(
            self.config.function,
            plan.sampler,
            self.params,
            plan.levels,
            _as_key(key),
            count,
            chosen,
            batch_size=self._batch_size(batch_size),
        )

    def draw_labels(self, key: int | Key[Array, ""], count: int) -> Int[np.ndarray, " n"] | None:
        """The classes that `sample` draws for this key where it is given none; None for an unconditional model."""
        classes = self.config.network.classes
        return None if classes is None else draw_labels(_as_key(key), count, classes)

    def plan(
        self,
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | Sampler | None = None,
    ) -> Plan:
        """The sampler and the levels that `sample` takes for these arguments."""
        if sampler is None:
            sampler = "consistency" if self.config.distilled else "heun"
        if isinstance(sampler, str):
            if sampler not in SAMPLERS:
                raise InputError(f"There is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
            sampler = SAMPLERS[sampler]
        if steps is None and timesteps is None and indices is None and sigmas is None:
            steps = 1 if self.config.distilled else TEACHER_STEPS
        levels = choose_levels(
            sampler,
            self.config.grid,
            steps=steps,
            timesteps=timesteps,
            indices=indices,
            sigmas=sigmas,
            tuned=self.config.tuned_timesteps,
        )
        return Plan(sampler, levels)

    def labels(
        self, labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None, count: int
    ) -> Int[np.ndarray, " n"] | None:
        """Class numbers for `count` images, from one class or one per image, by number or name.

        Raises InputError for unknown, ambiguous or wrongly many ones, and for any given to an unconditional model.
        """
        classes = self.config.network.classes
        if labels is None and classes is None:
            return None
        if labels is None:
            raise InputError(f"This model is class-conditional: give labels from 0 to {(classes or 1) - 1}.")
        if classes is None:
            raise InputError("Labels were given to an unconditional model: leave them out.")
        wanted = [labels] if isinstance(labels, str) else np.ravel(np.asarray(labels)).tolist()
        if len(wanted) not in (1, count):
            raise InputError(f"{len(wanted)} labels for {count} images: give one label, or one for each image.")
        numbers = [self._class_number(label, classes) for label in wanted]
        return np.asarray(numbers * (count // len(numbers)), np.int32)

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint that `load` reads, in the precision that the parameters have here."""
        native.save(Path(directory), self.config, self.params)

    def _batch_size(self, asked: int | None) -> int:
        if asked is None:
            return default_batch_size(self.config.network.image_shape[0]) * len(jax.local_devices())
        return check_int("batch_size", asked, 1, 10**6)

    def _refuse_denoisers(self) -> None:
        if not self.config.distilled:
            raise InputError(
                "Editing wants a consistency model, and this is a denoiser, whose single call is a blurred mean of "
                "what an image may be: take the model that was distilled from it."
            )

    def _edited(
        self,
        plan: Plan,
        operator: Operator,
        keys: Keys,
        images: Float[np.ndarray, "i h w c"],
        labels: Int[np.ndarray, " i"] | None,
        batch_size: int | None,
    ) -> Float[np.ndarray, "b h w c"]:
        function, size = self.config.function, self._batch_size(batch_size)
        parts = edit_all(function, operator, self.params, plan.levels, keys, images, labels, batch_size=size)
        return np.concatenate(list(parts))

    def _class_number(self, label: Label | float, classes: int) -> int:
        names = self.config.class_names
        label = label.strip() if isinstance(label, str) else label
        if isinstance(label, str) and not re.fullmatch(r"[+-]?[0-9]{1,9}", label):
            wanted = label.casefold()
            exact = [i for i, name in enumerate(names) if wanted == name.casefold()]
            found = exact or [i for i, name in enumerate(names) if wanted in name.casefold().split(", ")]
            if len(found) == 1:
                return found[0]
            if found:
                choices = ", ".join(f"{i} ({names[i]})" for i in found)
                raise InputError(f"{label!r} names several classes: give one of the numbers {choices}.")
            words = [word for name in names for word in [name, *name.split(", ")]]
            close = difflib.get_close_matches(label, words, n=1, cutoff=0.5)
            known = f"did you mean {close[0]!r}?" if close else "its classes are " + "; ".join(names[:10])
            hint = known if names else f"its classes have no names; give a number from 0 to {classes - 1}"
            raise InputError(f"This model has no class {label!r}: {hint}.".replace("?.", "?"))
        return check_int("A label", int(label) if isinstance(label, str) else label, 0, classes - 1)

    def _replayed(
        self,
        noise: Float[Array | np.ndarray, "draws b h w c"],
        count: int,
        labels: Label | Sequence[Label] | Int[Array | np.ndarray, " b"] | None,
        plan: Plan,
    ) -> Float[np.ndarray, "b h w c"]:
        shape = self.config.network.image_shape
        if noise.shape[1:] != (count, *shape):
            raise InputError(
                f"Noise must be [draws, {count}, {', '.join(map(str, shape))}] for {count} images: a standard normal "
                f"draw for the start, then one for each step; got {list(noise.shape)}."
            )
        steps = len(plan.levels) - 1
        needed = plan.sampler.draws(steps)
        if noise.shape[0] < needed:
            raise InputError(f"This sampler makes {needed} draws of noise in {steps} steps; got {noise.shape[0]}.")
        return replay(self.config.function, plan.sampler, self.params, plan.levels, noise, self.labels(labels, count))


@functools.partial(jax.jit, static_argnums=0)
def _denoise(function: ConsistencyFunction, params: Params, x: Array, sigma: Array, labels: Array | None) -> Array:
    return function(params, x, sigma, labels)


def _as_key(key: int | Key[Array, ""]) -> Key[Array, ""]:
    if isinstance(key, jax.Array):
        return key
    return jax.random.key(check_int("A seed", key, 0, 2**32 - 1))
