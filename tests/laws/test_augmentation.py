"""Augmentation: laws of the maps, of the resampling and of training with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.data.augmentation import Augmentation, resample
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.objectives import Batch, Denoising, FrozenParams, Models
from cm_jax.training.config import TrainConfig
from cm_jax.training.setup import make_step
from tests.support import relative
from tests.tiny import BATCH, FUNCTIONS, HELPERS, KEYS, LATE, OBJECTIVES, PARAMS, Tiny

MANY = jax.random.split(jax.random.key(0), 200)
NONE = Augmentation(1.0, x_flip=False, y_flip=False, scale=0, rotation=0, anisotropy=0, translation=0)
SIZE = 24


def waves(size=SIZE):
    """A smooth image: sums of waves of at least eight pixels, [1, size, size, 2]."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    channels = [np.sin(2 * np.pi * x / 12 + 1) + np.cos(2 * np.pi * y / 16), np.cos(2 * np.pi * (x + y) / 18)]
    return jnp.asarray(np.stack(channels, -1)[None], jnp.float32)


def drawn(augmentation, height=SIZE, width=SIZE):
    maps, parameters = jax.vmap(lambda key: augmentation.sample(key, height, width))(MANY)
    return np.asarray(maps, np.float64), np.asarray(parameters, np.float64)


def test_probability_zero_is_the_identity():
    images = jax.random.normal(jax.random.key(1), (200, 8, 6, 3))
    augmented, parameters = Augmentation(0.0, x_flip=False)(images, MANY)
    np.testing.assert_allclose(augmented, images, atol=1e-6)
    assert not np.any(parameters)


def test_parameters_of_a_map_that_is_off_are_zero():
    assert not np.any(drawn(NONE)[1])


def test_flips_and_whole_translations_only_move_pixels():
    image = jax.random.normal(jax.random.key(1), (1, 6, 8, 3))
    flip_x, flip_y = np.diag([-1.0, 1, 1]), np.diag([1.0, -1, 1])
    np.testing.assert_allclose(resample(image, jnp.asarray(flip_x)[None]), image[:, :, ::-1], atol=1e-5)
    np.testing.assert_allclose(resample(image, jnp.asarray(flip_y)[None]), image[:, ::-1], atol=1e-5)
    move = np.eye(3)
    move[0, 2] = 2  # the pixel at x comes from x + 2; beyond the border, from the reflection
    moved = np.take(np.asarray(image), [2, 3, 4, 5, 6, 7, 6, 5], axis=2)
    np.testing.assert_allclose(resample(image, jnp.asarray(move)[None]), moved, atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "rotation", "anisotropy", "translation"])
def test_each_map_is_undone_by_its_inverse(name):
    """In the middle of a smooth image, which the reflection at the borders does not reach."""
    strength = {"rotation": 0.25, "translation": 0.05}.get(name, 0.1)
    maps, parameters = drawn(dataclasses.replace(NONE, **{name: strength}))
    chosen = np.argsort(np.abs(parameters).sum(1))[100]
    image, matrix = waves(48), jnp.asarray(maps[chosen : chosen + 1], jnp.float32)
    changed = resample(image, matrix)
    back = resample(changed, jnp.linalg.inv(matrix))
    middle = (slice(None), slice(16, 32), slice(16, 32))
    assert relative(changed[middle], np.asarray(image[middle])) > 0.1
    assert relative(back[middle], np.asarray(image[middle])) < 0.01


def test_parameters_determine_the_map():
    """The matrix from the parameters, written down independently."""
    maps, parameters = drawn(Augmentation(0.9), 16, 32)
    for matrix, (flip, flop, scale, c, s, along_x, along_y, x, y) in zip(maps, parameters, strict=True):
        sign = 1 if along_x >= 0 else -1
        angle, axis = np.arctan2(s, c + 1), np.arctan2(sign * along_y, sign * along_x)
        stretch = sign * np.hypot(along_x, along_y)

        def turn(a):
            return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])

        forward = turn(-axis) @ np.diag(2.0 ** (0.2 * np.array([stretch, -stretch]))) @ turn(axis)
        forward = forward @ turn(-angle) * 2.0 ** (0.2 * scale) @ np.diag([1 - 2 * flip, 1 - 2 * flop])
        np.testing.assert_allclose(np.linalg.inv(matrix)[:2, :2], forward, atol=2e-5)
        np.testing.assert_allclose(np.linalg.inv(matrix)[:2, 2], [0.125 * 32 * x, 0.125 * 16 * y], atol=2e-5)


def test_each_map_has_its_probability():
    _, parameters = drawn(Augmentation(0.25))
    share = (parameters != 0).mean(0)
    expected = [0.5, 0.125, *[0.25] * 4, 0.125, 0.25, 0.25]  # the axis is rotated for half of the images
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 200))
    np.testing.assert_array_equal(parameters[:, 7] != 0, parameters[:, 8] != 0)  # one translation


def test_the_student_is_told_and_the_sampler_is_not():
    """Training passes the parameters to the network; without them its output is that of zero parameters."""
    network = SongUNet(8, base_channels=8, channel_mult=(1,), blocks_per_level=1, attention_factors=(), augment_dim=9)
    config = TrainConfig(network=network, augmentation=Augmentation())
    draws = iter(np.random.default_rng(0).normal(size=(100, 10_000)) / 4)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(next(draws)[: leaf.size].reshape(leaf.shape), jnp.float32), network.shapes()
    )
    images, told = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 9))
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(augmentation):
        batch = Batch(images, None, augmentation)
        return Denoising()(Models(config.function), params, FrozenParams(), batch, keys, jnp.int32(0))[0]

    np.testing.assert_array_equal(loss(None), loss(0 * told))
    assert np.all(loss(told) != loss(None))


@dataclasses.dataclass(frozen=True)
class Told(Tiny):
    """A network that takes the parameters of the augmentation as input."""

    augment_dim: int = 9

    def predict(self, params, x, *arguments, augmentation=None, **given):
        told = 0.0 if augmentation is None else augmentation.sum(1)[:, None, None, None]
        return super().predict(params, x + told, *arguments, **given)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_tells_the_student_and_the_teacher(name):
    student, teacher = FUNCTIONS[name].student, FUNCTIONS[name].teacher
    told = dataclasses.replace(student, network=Told(interval_embedding=student.network.interval_embedding))
    teachers = [teacher] if teacher is None else [teacher, dataclasses.replace(teacher, network=Told())]

    def loss(teacher, augmentation):
        batch, params = BATCH._replace(augmentation=augmentation), PARAMS | OBJECTIVES[name].extras()
        return OBJECTIVES[name](Models(told, teacher), params, HELPERS, batch, KEYS, jnp.int32(LATE))[0]

    parameters = jnp.full((len(BATCH.images), 9), 0.05)
    losses = [loss(each, parameters) for each in teachers]
    assert np.all(losses[0] != loss(teachers[0], None))
    if teacher is not None:
        assert np.any(losses[0] != losses[1])


def test_images_are_flipped_once_and_the_network_is_told():
    """The flip of the augmentation replaces that of training."""
    network = SongUNet(8, base_channels=8, channel_mult=(1,), blocks_per_level=1, attention_factors=(), augment_dim=9)
    for flips, expected in ((True, False), (False, True)):
        config = TrainConfig(network=network, augmentation=Augmentation(x_flip=flips))
        assert make_step(config, None).flip == expected


@pytest.mark.parametrize("network", [SongUNet(), SongUNet(augment_dim=3)])
def test_a_network_that_is_not_told_is_refused(network):
    with pytest.raises(InputError, match=r"augment-dim 9"):
        TrainConfig(network=network, augmentation=Augmentation())


def test_strengths_are_checked():
    with pytest.raises(InputError, match="probability"):
        Augmentation(1.5)
    with pytest.raises(InputError, match="scale"):
        Augmentation(scale=-1)
