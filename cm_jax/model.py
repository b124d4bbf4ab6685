"""Class Model: denoise, sample, edit, interpolate, save."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cm_jax.arguments import Seed, Seeds, as_array, as_images, as_key, as_keys, as_pair, is_traced
from cm_jax.checkpoints import class_labels
from cm_jax.checkpoints.model_config import ClassLabels, ModelConfig
from cm_jax.conversion import PushOptions, push, write
from cm_jax.diffusion.guidance import AnyFunction
from cm_jax.editing import algorithm
from cm_jax.editing.operators import Operator, Strokes
from cm_jax.errors import InputError, check_int, one_line
from cm_jax.io.atomic import user_path
from cm_jax.parallelism import Parallelism
from cm_jax.progress import counted, on_terminal
from cm_jax.samplers import Guidance, GuidanceArgs, NoiseLevelArgs, Sampler, choose_guidance
from cm_jax.samplers.generation import batching, generate, replay, sample_labels
from cm_jax.samplers.plan import SamplingPlan, checked_noise, make_plan
from cm_jax.types import Images, Keys, Labels, Params, Sigmas

ImageArray = Float[Array | np.ndarray, "b h w c"]


class PlanArgs(NoiseLevelArgs, GuidanceArgs, total=False):
    """Noise levels and guidance."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "parallelism"])
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A consistency model, or a denoiser such as an EDM teacher, with its parameters.

    It is a pytree: the parameters are its leaves and the config is static, so it passes through jit, grad, vmap,
    jax.tree.map, optax and Orbax. `denoise` accepts traced arguments; inside jit, sample with cm_jax.samplers.sample.

    All methods raise InputError for invalid arguments. Arguments that several methods share:
      images: NHWC, clean images in [-1, 1].
      labels: class numbers or names, one for all images or one per image; None for an unconditional model.
      batch_size: images computed at once over all devices of this process. It does not change the results.
      **levels: noise levels, as steps=2, timesteps=(22, 0), indices=(0, 22, 39) or sigmas=(80.0, 1.38); see
        cm_jax.samplers.NoiseLevelArgs. Where samplers are, also guidance=1.5, guide=other_model and
        guidance_interval=(0.28, 2.9); see cm_jax.samplers.GuidanceArgs.
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    parallelism: Parallelism | None = dataclasses.field(default=None, repr=False)
    """How the devices of this process share images: `cm_jax.parallelism.choose_for_images`, the default."""

    def denoise(
        self, images: ImageArray, sigma: float | Float[Array | np.ndarray, "*b"], labels: ClassLabels | None = None
    ) -> Float[Array, "b h w c"]:
        """f(images, sigma, labels), or D(images, sigma, labels) for a denoiser: estimates of the clean images.

        images: clean images plus noise of standard deviation sigma. sigma: one level for all images or one per image.
        All arguments and the parameters may be traced, and derivatives pass through; values of traced arguments are
        not checked.
        """
        x = jnp.asarray(as_images(images), jnp.float32)
        sigmas = jnp.asarray(as_array("sigma", sigma), jnp.float32)
        self.config.network.check_input(x.shape, labels is not None)
        valid = is_traced(sigmas) or bool(np.all(np.isfinite(sigmas) & (np.asarray(sigmas) >= 0)))
        if sigmas.shape not in ((), (x.shape[0],)) or not valid:
            raise InputError(f"Expected one sigma or {x.shape[0]}, finite and not negative; got {one_line(sigma)}.")
        find = class_labels.traced_numbers if is_traced(labels) else self.class_numbers
        numbers = None if labels is None else jnp.asarray(find(labels, x.shape[0]), jnp.int32)  # type: ignore[arg-type]
        function, params = self.program(choose_guidance(self.config))
        return _denoise(function, params, x, jnp.broadcast_to(sigmas, x.shape[:1]), numbers)

    def sample(
        self,
        key: Seed | None = None,
        count: int = 1,
        *,
        seeds: Seeds | None = None,
        labels: ClassLabels | None = None,
        sampler: str | Sampler | None = None,
        batch_size: int | None = None,
        noise: Float[Array | np.ndarray, "k b h w c"] | None = None,
        progress: bool = False,
        **levels: Unpack[PlanArgs],
    ) -> Float[np.ndarray, "b h w c"]:
        """`count` images, NHWC float32 in [-1, 1]. Image i depends on the key, on i and on its label alone.

        Models of the EDM family do not clip: values may slightly exceed [-1, 1].

        seeds: in place of a key and a count, [3, 8] for the first image of each seed: sample(3) and sample(8).
        labels: None samples them from the key (see `sample_labels`). levels: by default one step, or 40 for a denoiser.
        sampler: one, or its name in cm_jax.samplers.SAMPLERS. Default: the config's, or consistency (denoisers: heun).
        noise: standard normal noise in place of the key's, of all images in one batch: initial, then one for each step.
        progress: show a bar, which advances with each batch, on a terminal or, with ipywidgets, in a notebook.
        """
        self._check_untraced("sample", key, seeds, labels, noise)
        plan = self.plan(sampler=sampler, **levels)
        if noise is not None:
            if batch_size is not None or progress:
                raise InputError("Images of given noise are one batch: leave batch_size and progress out.")
            given = key is not None or seeds is not None
            keys, count = as_keys(key if given else 0, count, seeds)
            noise = checked_noise(noise, (count, *self.config.network.image_shape), plan)
            numbers = self.class_numbers(labels, count, keys if given else None)
            function, params = self.program(plan.guidance)
            return replay(function, plan.sampler, params, plan.levels, noise, numbers)
        total = as_keys(key, count, seeds)[1]
        batches = self.batches(key, count, plan, seeds=seeds, labels=labels, batch_size=batch_size)
        with on_terminal() if progress is True else contextlib.nullcontext():
            return np.concatenate(list(counted(batches, total, "Sampling")))

    def batches(
        self,
        key: Seed | None,
        count: int,
        plan: SamplingPlan,
        *,
        seeds: Seeds | None = None,
        labels: ClassLabels | None = None,
        batch_size: int | None = None,
        first: int = 0,
    ) -> Iterator[Float[np.ndarray, "b h w c"]]:
        """The images of `sample` from number `first` on, one batch at a time. Arguments are checked at the call."""
        self._check_untraced("batches", key, seeds, labels)
        keys, count = as_keys(key, count, seeds)
        numbers = self.class_numbers(labels, count, keys)
        (function, params), devices = self.program(plan.guidance), self.batching(batch_size)
        return generate(function, plan.sampler, params, plan.levels, keys, count, numbers, *devices, first=first)

    def edit(
        self,
        key: Seed,
        images: ImageArray,
        operator: Operator,
        *,
        labels: ClassLabels | None = None,
        variants: int = 1,
        batch_size: int | None = None,
        guidance: float | None = None,
        **levels: Unpack[NoiseLevelArgs],
    ) -> Float[np.ndarray, "n h w c"]:
        """`variants` edits of every image, grouped by image (CM, algorithm 4).

        operator: the kind of edit (see cm_jax.editing): Mask(known) inpaints, Luma() colorizes, PatchMean(8) is
        super-resolution, Strokes() is SDEdit, Noisy() denoises. The known part of an image is preserved to 1e-6, for
        which values may leave [-1, 1]. levels: by default those of the operator, or 17 steps from sigma_max. guidance:
        strength of a model distilled with a range. An edit depends on the key and its image and variant numbers alone.
        """
        self._check_untraced("edit", key, images, labels)
        algorithm.check_editable(self.config)
        images = algorithm.check_images(images, operator, self.config.network.image_shape)
        levels = algorithm.edit_levels(operator, images.shape[1:], **levels)
        plan = self.plan(sampler="consistency", guidance=guidance, **levels)
        keys = algorithm.variant_keys(as_key(key), len(images), check_int("variants", variants, 1, 10**6))
        return self._edit(plan, operator, keys, images, labels, batch_size)

    def interpolate_images(
        self,
        key: Seed,
        first: Float[Array | np.ndarray, "h w c"],
        second: Float[Array | np.ndarray, "h w c"],
        frames: int = 8,
        *,
        labels: ClassLabels | None = None,
        sigmas: Sequence[float] | Float[Array | np.ndarray, " n"] | None = None,
        batch_size: int | None = None,
        guidance: float | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """`frames` images from `first` to `second`: linear blends of both, each edited as Strokes with the same noise.

        sigmas: by default those of Strokes; a higher first level changes the images more. guidance: as for `edit`.
        """
        self._check_untraced("interpolate_images", key, first, second, labels)
        algorithm.check_editable(self.config)
        frames = check_int("frames", frames, 2, 10**6)
        pair = algorithm.check_images(as_pair(first, second), Strokes(), self.config.network.image_shape)
        levels = algorithm.edit_levels(Strokes(), pair.shape[1:], sigmas=sigmas)
        plan = self.plan(sampler="consistency", guidance=guidance, **levels)
        keys = jnp.repeat(algorithm.variant_keys(as_key(key), 1, 1), frames)
        return self._edit(plan, Strokes(), keys, algorithm.blend(pair[0], pair[1], frames), labels, batch_size)

    def interpolate_noise(
        self,
        first: Seed,
        second: Seed,
        frames: int = 8,
        *,
        labels: ClassLabels | None = None,
        sampler: str | Sampler | None = None,
        batch_size: int | None = None,
        **levels: Unpack[PlanArgs],
    ) -> Float[np.ndarray, "n h w c"]:
        """`frames` images from the first sample of one key to the first sample of another, as by `sample`.

        All noise is interpolated spherically (CM, appendix D).
        """
        self._check_untraced("interpolate_noise", first, second, labels)
        plan = self.plan(sampler=sampler, **levels)
        frames = check_int("frames", frames, 2, 10**6)
        ends, numbers = (as_key(first), as_key(second)), self.class_numbers(labels, frames)
        function, params = self.program(plan.guidance)
        program, devices = (function, plan.sampler, params, plan.levels), self.batching(batch_size)
        parts = algorithm.slerp_batches(*program, *ends, numbers, frames, *devices)
        return np.concatenate(list(counted(parts, frames, "Interpolating")))

    def plan(
        self,
        *,
        sampler: str | Sampler | None = None,
        clip: bool | None = None,
        guidance: float | None = None,
        guide: Any = None,
        guidance_interval: Sequence[float] | None = None,
        **levels: Unpack[NoiseLevelArgs],
    ) -> SamplingPlan:
        """The sampler, the noise levels and the guidance of `sample` with these arguments.

        clip: clip denoised images to [-1, 1]; by default as the sampler and the config's `clip_denoised` say.
        """
        if guide is not None and not isinstance(guide, Model):
            raise InputError(f"Expected a Model as guide, as load returns it, got {one_line(guide)}.")
        chosen = choose_guidance(self.config, guidance, guide, guidance_interval)
        return make_plan(self.config, sampler, clip, chosen, **levels)

    def program(self, guidance: Guidance | None) -> tuple[AnyFunction, Params]:
        """The function that samplers call with this guidance, and its parameters."""
        function = self.config.function
        return (function, self.params) if guidance is None else guidance.program(function, self.params)

    def sample_labels(
        self, key: Seed | None = None, count: int = 1, *, seeds: Seeds | None = None
    ) -> Int[np.ndarray, " n"] | None:
        """The class numbers that `sample` uses for this key or these seeds; None for an unconditional model."""
        keys, count = as_keys(key, count, seeds)
        return self.class_numbers(None, count, keys)

    def class_numbers(
        self, labels: ClassLabels | None, count: int, key: Key[Array, "*n"] | None = None
    ) -> Int[np.ndarray, " n"] | None:
        """Class numbers of `labels` for `count` images; None for an unconditional model.

        key: of the images, or one for each, from which classes are sampled where `labels` is None.
        """
        if labels is None and key is not None and self.config.network.classes is not None:
            return sample_labels(key, count, self.config.network.classes)
        return self.config.class_numbers(labels, count)

    def vae_latents(self, images: ImageArray) -> Float[np.ndarray, "b h w c"]:
        """Samples of a model of latents (EDM2 at 512 pixels) as its autoencoder's decoder expects them, NHWC."""
        if self.config.latents is None:
            raise InputError("Expected a model of latents, got one of images: its samples need no decoder.")
        return self.config.latents.decodable(np.asarray(images, np.float32))

    def save(self, path: str | Path) -> None:
        """Write a native checkpoint in the precision of the parameters: a .safetensors file, else a folder."""
        write(user_path(path), "native", self.config, self.params)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload the model with a model card to "owner/name" on the Hugging Face Hub; returns the commit's address."""
        return push(repo_id, self.config, self.params, **options)

    def batching(self, batch_size: int | None = None) -> tuple[int, Parallelism]:
        """Images per batch over all devices of this process, by default 64 per device or fewer; and the devices."""
        return batching(batch_size, self.config.network.image_shape, self.parallelism)

    def _check_untraced(self, method: str, *arguments: Any) -> None:
        """Raise InputError inside jit, grad and vmap for a method that returns NumPy arrays."""
        if is_traced(self.params, *arguments):
            raise InputError(
                f"Model.{method} returns NumPy arrays and cannot be traced by jit, grad or vmap: use "
                "Model.denoise or cm_jax.samplers.sample there, which are pure functions."
            )

    def _edit(
        self,
        plan: SamplingPlan,
        operator: Operator,
        keys: Keys,
        images: Float[np.ndarray, "i h w c"],
        labels: ClassLabels | None,
        batch_size: int | None,
    ) -> Float[np.ndarray, "b h w c"]:
        (function, params), numbers = self.program(plan.guidance), self.class_numbers(labels, len(images))
        program, devices = (function, operator, params, plan.levels), self.batching(batch_size)
        parts = algorithm.edit_batches(*program, keys, images, numbers, *devices)
        return np.concatenate(list(counted(parts, len(keys), "Editing")))


@functools.partial(jax.jit, static_argnums=0)
def _denoise(
    function: AnyFunction, params: Params, x: Images, sigma: Sigmas, labels: Labels | None
) -> Float[Array, "b h w c"]:
    return function.denoiser(params, labels)(x, sigma)
