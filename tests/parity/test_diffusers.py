"""Parity with diffusers: recorded pipeline images, constants of its own tests, and exported checkpoints."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline
from diffusers.schedulers import scheduling_consistency_models

import cm_jax
from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.io.images import quantize
from cm_jax.model import Model
from cm_jax.samplers import Consistency, choose_levels
from cm_jax.types import per_image
from tests.parity.test_network import FLAVORS, flavor_params
from tests.support import DATA, EMOJI, SMALL, nhwc, random_params


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(("key", "options"), [("1step", {"steps": 1}), ("22_0", {"timesteps": (22, 0)})])
def test_recorded_pipeline_images(flavor, key, options, optimized):
    golden = np.load(DATA / "diffusers" / "diffusers_golden.npz")
    network = FLAVORS[flavor]
    model = Model(ModelConfig(network, ConsistencyPreconditioning()), flavor_params(flavor))
    noise = np.broadcast_to(nhwc(golden["Z"]), (3, 2, 32, 32, 3))
    labels = [7, 999] if network.classes else None
    images = model.sample(0, 2, labels=labels, noise=noise, **options)
    # the bound is relative to the scale of f before clipping, 3 to 4.4 with these weights
    scale = np.abs(model.denoise(80 * noise[0], 80.0, labels)).max()
    assert 1 < scale < 10
    np.testing.assert_allclose(images / 2 + 0.5, golden[f"{flavor}_pipe_{key}"], atol=1e-5 * scale)
    if key == "22_0":
        pixels, expected = quantize(images).astype(int), golden[f"{flavor}_pipe_22_0_uint8"]
        assert np.abs(pixels - expected).max() <= 1  # rounding near one half
        assert (pixels != expected).mean() < 1e-3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"timesteps": (22, 0)}, [0.3572, 0.6273, 0.4031, 0.3961, 0.4321, 0.5730, 0.5266, 0.4780, 0.5004]),
        ({"steps": 1}, [0.5004, 0.5004, 0.4994, 0.5008, 0.4976, 0.5018, 0.4990, 0.4982, 0.4987]),
    ],
)
def test_constants_of_pipeline_tests(options, expected):
    """The networks of these tests return zero, so the images depend only on noise and scheduler."""
    noise = np.load(DATA / "diffusers" / "torch_seed0_noise_1x3x32x32.npz")
    noises = np.stack([nhwc(noise[name]) for name in noise.files])
    network = dataclasses.replace(SMALL, image_size=32, classes=None)
    zero_output = {**random_params(network), "head": {**random_params(network)["head"]}}
    zero_output["head"]["output"] = {"kernel": jnp.zeros((3, 3, 32, 3)), "bias": jnp.zeros(3)}
    model = Model(ModelConfig(network, ConsistencyPreconditioning()), zero_output)
    image = model.sample(0, 1, noise=noises, **options)[0] / 2 + 0.5
    np.testing.assert_allclose(image[-3:, -3:, -1].ravel(), expected, atol=1e-3)


def toy(x, sigma):
    """The consistency function with the network F(x, t) = x t / (t + 1) of the diffusers scheduler tests."""
    preconditioning = ConsistencyPreconditioning()
    time = per_image(preconditioning.c_noise(sigma))
    return preconditioning.blend(x, sigma, per_image(preconditioning.c_in(sigma)) * x * time / (time + 1), 0.002)


@pytest.mark.parametrize(
    ("options", "total", "mean"), [({"steps": 1}, 192.7614, 0.2510), ({"timesteps": (106, 0)}, 347.6357, 0.4527)]
)
def test_constants_of_scheduler_tests(options, total, mean):
    start = nhwc((np.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2))
    noise = np.load(DATA / "diffusers" / "torch_seed0_noise_4x3x8x8.npz")
    noises = jnp.asarray(np.stack([start, *(nhwc(noise[name]) for name in noise.files)]), jnp.float32)
    levels = choose_levels(Consistency(), KarrasSchedule(), 201, **options)
    images = Consistency()(toy, jnp.asarray(levels, jnp.float32), lambda index: noises[index])
    assert jnp.abs(images).sum() == pytest.approx(total, abs=1e-2)
    assert jnp.abs(images).mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(("kind", "resampling"), [("emoji", None), ("random", "residual"), ("random", "convolution")])
def test_exported_checkpoint_gives_the_same_images_in_diffusers(tmp_path, monkeypatch, kind, resampling):
    if kind == "emoji":
        model = cm_jax.load(EMOJI)
    else:
        network = dataclasses.replace(SMALL, classes=None, modulation="additive", resampling=resampling)
        model = Model(ModelConfig(network, ConsistencyPreconditioning()), random_params(network))
    conversion.write(tmp_path / "exported", "diffusers", model.config, model.params)
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)

    size, labels = model.config.network.image_shape[0], [5, 2] if model.config.network.classes else None
    noise = np.random.default_rng(0).standard_normal((3, 2, size, size, 3)).astype(np.float32)
    later = iter(noise[1:])
    monkeypatch.setattr(
        scheduling_consistency_models, "randn_tensor", lambda *_, **__: torch.from_numpy(_nchw(next(later)))
    )
    expected = pipeline(
        batch_size=2,
        class_labels=labels,
        timesteps=[8, 0],
        latents=torch.from_numpy(_nchw(noise[0])),
        output_type="np",
        num_inference_steps=None,
    ).images
    images = model.sample(0, 2, labels=labels, timesteps=(8, 0), noise=noise) / 2 + 0.5
    np.testing.assert_allclose(images, expected, atol=1e-5)


def _nchw(images):
    return images.transpose(0, 3, 1, 2).copy()
