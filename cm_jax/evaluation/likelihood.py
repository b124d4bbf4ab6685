"""Bits per dimension of a denoiser, by the probability-flow ODE and Hutchinson's estimator (Song et al. 2021)."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key, UInt8

from cm_jax.data import Dataset
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.ode import dx_dlog_sigma, heun_step
from cm_jax.errors import InputError, check_int
from cm_jax.evaluation.metrics import Report
from cm_jax.model import Model
from cm_jax.progress import counted
from cm_jax.samplers.batches import by_number
from cm_jax.samplers.generation import image_keys
from cm_jax.types import Denoiser, Images, Keys, Labels, Params

State = tuple[Images, Float[Array, " b"]]
"""y, and the integral of the divergence."""


def log_density(
    denoiser: Denoiser, x: Images, probes: Images, *, steps: int, sigma_min: float, sigma_max: float, std: float
) -> Float[Array, " b"]:
    """ln p(x) in nats for data noised to sigma_min.

    With t = ln sigma: dx/dt = x - D(x, sigma) and d ln p(x)/dt = -div (x - D); div is estimated by v . J v with random
    `probes` v of +1 and -1. Heun steps of equal length in t integrate y = x / sqrt(sigma^2 + std^2), which is constant
    for Gaussian data with that standard deviation. The density at sigma_max is N(0, sigma_max^2 + std^2).
    """
    low, high = math.log(sigma_min), math.log(sigma_max)
    length = (high - low) / steps

    def spread(t: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.sqrt(jnp.exp(2 * t) + std**2)

    def derivative(state: State, t: Float[Array, ""]) -> State:
        """(dy/dt, the estimate of div_x dx/dt)."""
        (y, _), scale, sigma = state, spread(t), jnp.exp(t)
        velocity, pushed = jax.jvp(lambda x: dx_dlog_sigma(denoiser, x, sigma), (y * scale,), (probes,))
        return velocity / scale - y * (sigma / scale) ** 2, (probes * pushed).sum((1, 2, 3))

    def step(state: State, number: Float[Array, ""]) -> tuple[State, None]:
        return heun_step(derivative, state, low + number * length, low + (number + 1) * length), None

    start = (x / spread(jnp.float32(low)), jnp.zeros(x.shape[0]))
    (y, divergence), _ = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.float32))
    constant = math.prod(x.shape[1:]) / 2 * math.log(2 * math.pi * (sigma_max**2 + std**2))
    return divergence - (y**2).sum((1, 2, 3)) / 2 - constant


def bits_per_dimension(
    model: Model,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, " n"] | None = None,
    *,
    seed: int = 0,
    start: int = 0,
    steps: int = 64,
    batch_size: int | None = None,
) -> Float[np.ndarray, " n"]:
    """-log2 P(8-bit pixels) / dimensions of each image: an unbiased estimate of an upper bound.

    Uniform dequantization, x = (u - 1/2 + v) / 127.5 - 1, gives the offset log2 127.5. start: number of the first
    image, which determines its noise. Raises InputError for a consistency function, which has no probability-flow ODE,
    and for images of another shape.
    """
    config = model.config
    if config.distilled:
        raise InputError("Bits per dimension need a denoiser: a consistency function has no probability-flow ODE.")
    if images.shape[1:] != config.network.image_shape or not len(images):
        raise InputError(f"Expected images of shape {list(config.network.image_shape)}, got {list(images.shape)}.")
    check_int("The number of steps", steps, 1, 100_000)
    chosen = model.class_numbers(labels, len(images))
    batching = model.batching(batch_size)
    key = jax.random.key(check_int("A seed", seed, 0, 2**32 - 1))

    def rows(numbers: Int[np.ndarray, " b"]) -> tuple[Any, ...]:
        return image_keys(key, start + numbers), images[numbers], None if chosen is None else chosen[numbers]

    static, shared = (config.function, steps), (model.params,)
    parts = by_number(image_bits, static, shared, rows, len(images), *batching, name="the likelihood")
    return np.concatenate(list(parts))


def evaluate_bits(
    model: Model,
    dataset: Dataset,
    count: int | None = None,
    *,
    seed: int = 0,
    steps: int = 64,
    batch_size: int | None = None,
    names: tuple[str, str] = ("the model", "the data set"),
) -> Report:
    """Mean bits per dimension of all images of a data set, or of `count` chosen by a fixed permutation.

    names: names of model and data set in the report. Raises InputError for a conditional model and images without
    labels.
    """
    count = check_int("The number of images", dataset.size if count is None else count, 2, dataset.size)
    conditional = model.config.network.classes is not None
    if conditional and dataset.classes is None:
        raise InputError(f"{names[0]} is class-conditional, but {names[1]} has no labels.")
    size, _ = model.batching(batch_size)

    def batches() -> Iterator[np.ndarray]:
        for start, (images, labels) in zip(range(0, count, size), dataset.first(count, size), strict=True):
            own = labels if conditional else None
            yield bits_per_dimension(model, images, own, seed=seed, start=start, steps=steps, batch_size=size)

    bits = np.concatenate(list(counted(batches(), count, "Evaluating the likelihood"))).astype(np.float64)
    mean, error = float(bits.mean()), float(bits.std(ddof=1) / count**0.5)
    line = (
        f"bits per dimension {mean:.4f} ± {error:.4f} (standard error) [N = {count:,} of {names[1]} under {names[0]}; "
        f"probability-flow ODE in {steps} Heun steps, one Hutchinson probe, uniform dequantization, seed {seed}]"
    )
    protocol = {"bpd_model": names[0], "bpd_count": count, "bpd_images": names[1], "bpd_steps": steps, "bpd_seed": seed}
    return Report({"bpd": mean, "bpd_standard_error": error}, protocol, line)


def image_bits(
    f: ConsistencyFunction, steps: int, params: Params, keys: Keys, u: UInt8[Array, "b h w c"], labels: Labels | None
) -> Float[Array, " b"]:
    shape = u.shape[1:]

    def noise(key: Key[Array, ""]) -> tuple[Float[Array, "h w c"], Float[Array, "h w c"]]:
        """v - 1/2, and the probe."""
        pixel_key, probe_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        v = jax.random.uniform(pixel_key, shape, jnp.float32, -0.5, 0.5)
        return v, jax.random.rademacher(probe_key, shape, jnp.float32)

    v, probes = jax.vmap(noise)(keys)
    sigmas = {"sigma_min": f.schedule.sigma_min, "sigma_max": f.schedule.sigma_max}
    denoiser, x, std = f.denoiser(params, labels), (u + v) / 127.5 - 1, f.preconditioning.sigma_data
    nats = log_density(denoiser, x, probes, steps=steps, std=std, **sigmas)
    return -nats / (math.prod(shape) * math.log(2)) + math.log2(127.5)
