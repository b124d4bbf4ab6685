"""Operators are orthogonal projections, the known part is preserved, and edits depend on their key alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.editing import Luma, Mask, Noisy, PatchMean, Strokes, blend, edit, slerp
from cm_jax.editing.algorithm import edit_batches, slerp_batches, variant_keys
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.networks import ADMUNet
from cm_jax.parallelism import DataMesh, OneDevice
from cm_jax.samplers import Consistency, choose_levels
from cm_jax.samplers.generation import generate, image_keys
from cm_jax.types import normal_per_image
from tests.support import gaussian_denoiser, random_params
from tests.toy import ToyNetwork

KNOWN = np.random.default_rng(0).random((3, 12, 8, 1)) < 0.4
X, Y = (jax.random.uniform(jax.random.key(seed), (3, 12, 8, 3), minval=-1, maxval=1) for seed in (0, 1))
PROJECTIONS = {
    "luma": Luma(),
    "mask": Mask(KNOWN),
    "patch_1": PatchMean(1),
    "patch_2": PatchMean(2),
    "patch_4": PatchMean(4),
    "nothing": Strokes(),
}
SMALL = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=32, classes=3
)
MODEL = Model(ModelConfig(SMALL, ConsistencyPreconditioning()), SMALL.prepare(random_params(SMALL)))
TOY = ConsistencyFunction(ToyNetwork(image_size=8), ConsistencyPreconditioning())
TOY_PARAMS = TOY.network.initialize(jax.random.key(0))


def inner(a, b):
    return float((np.asarray(a, np.float64) * np.asarray(b, np.float64)).sum())


@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_operator_is_an_orthogonal_projection(name):
    project = PROJECTIONS[name].project
    np.testing.assert_allclose(project(project(X)), project(X), atol=1e-6)
    np.testing.assert_allclose(project(2 * X - 3 * Y), 2 * project(X) - 3 * project(Y), atol=2e-6)
    assert inner(project(X), Y) == pytest.approx(inner(X, project(Y)), abs=1e-4)
    assert inner(project(X), X - project(X)) == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(project(X) + (X - project(X)), X, atol=1e-6)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_replace_combines_the_known_part_of_one_image_with_the_rest_of_another(name):
    operator = PROJECTIONS[name]
    mixed = operator.replace(X, Y)
    np.testing.assert_allclose(operator.project(mixed), operator.project(X), atol=1e-6)
    np.testing.assert_allclose(mixed - operator.project(mixed), Y - operator.project(Y), atol=1e-6)


def rank(operator, channels=3):
    """Dimension of the known part of a 4 x 4 image: the trace of P."""
    unit = jnp.eye(16 * channels).reshape(-1, 4, 4, channels)
    return inner(operator.project(unit), unit)


def test_dimension_of_the_known_part():
    """One of three numbers per pixel; one number per patch and channel."""
    assert rank(Luma()) == pytest.approx(16, abs=1e-4)
    assert rank(PatchMean(2)) == pytest.approx(4 * 3, abs=1e-4)
    assert rank(PatchMean(4)) == pytest.approx(3, abs=1e-4)
    assert rank(PatchMean(1)) == pytest.approx(48, abs=1e-4)
    assert rank(Strokes()) == 0


def orthonormal(v):
    """OpenAI's Q: QR decomposition of the identity with v as its first column, with the sign that keeps v."""
    basis = np.eye(len(v))
    basis[:, 0] = v
    q, _ = np.linalg.qr(basis)
    return -q if q[:, 0].sum() < 0 else q


def test_closed_forms_equal_the_change_of_basis_of_openai():
    """Coordinate 0 of one image and the other coordinates of the other, in the basis Q; in double precision."""
    v = np.array([0.2989, 0.587, 0.114])
    q = orthonormal(v / np.linalg.norm(v))
    np.testing.assert_allclose(q[0], [0.44711343, -0.82042528, 0.35635927], atol=1e-6)
    a, b = (np.asarray(image, np.float64) @ q for image in (X, Y))
    b[..., 0] = a[..., 0]
    np.testing.assert_allclose(Luma().replace(X, Y), b @ q.T, atol=1e-6)

    q = orthonormal(np.full(16, 0.25))
    a, b = (np.asarray(i, np.float64).reshape(3, 3, 4, 2, 4, 3).transpose(0, 1, 3, 5, 2, 4) for i in (X, Y))
    a, b = (patches.reshape(*patches.shape[:4], 16) @ q for patches in (a, b))
    b[..., 0] = a[..., 0]
    patches = (b @ q.T).reshape(3, 3, 2, 3, 4, 4).transpose(0, 1, 4, 2, 5, 3)
    np.testing.assert_allclose(PatchMean(4).replace(X, Y), patches.reshape(X.shape), atol=1e-6)


def test_a_gray_picture_has_the_known_part_of_its_color_picture():
    np.testing.assert_allclose(Luma().project(Luma().preview(X)), Luma().project(X), atol=2e-4)
    assert float(np.ptp(Luma().preview(X), axis=-1).max()) == 0


def edit_from_noise(operator, images=X, sigmas=(80.0, 5.0, 0.5), denoiser=None):
    levels = jnp.asarray(choose_levels(Consistency(), KarrasSchedule(), 40, sigmas=sigmas), jnp.float32)
    keys = jax.random.split(jax.random.key(5), 9)
    return edit(
        denoiser or gaussian_denoiser(), operator, images, levels, lambda i: jax.random.normal(keys[i], images.shape)
    )


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("sigmas", [(80.0,), (80.0, 5.0, 0.5)], ids=len)
def test_the_known_part_is_preserved_in_every_edit(name, sigmas):
    """Also with a denoiser that changes everything."""
    operator = PROJECTIONS[name]
    for denoiser in (gaussian_denoiser(), lambda x, sigma: 9 * jnp.sin(x)):
        after = edit_from_noise(operator, sigmas=sigmas, denoiser=denoiser)
        np.testing.assert_allclose(operator.project(after), operator.project(X), atol=1e-6)
    if name == "mask":
        np.testing.assert_array_equal(np.where(KNOWN, after, 0), np.where(KNOWN, X, 0))


def test_a_completely_known_image_is_returned():
    np.testing.assert_array_equal(edit_from_noise(Mask(np.ones_like(KNOWN))), X)
    np.testing.assert_allclose(edit_from_noise(PatchMean(1)), X, atol=1e-6)


def test_correlated_pixels_are_inpainted_by_the_exact_consistency_function():
    """Pairs of equal pixels from N(0, 1): one pixel of each pair is known, and the other is found."""

    def exact(x, sigma):
        mean = x.mean(2, keepdims=True)
        variance = sigma[:, None, None, None] ** 2 / 2
        return jnp.broadcast_to(mean * jnp.sqrt(1 / (1 + variance)), x.shape)

    value = jax.random.uniform(jax.random.key(0), (2, 64, 1, 1), minval=-0.8, maxval=0.8)
    known = np.zeros((2, 64, 2, 1), bool)
    known[:, :, 0] = True
    sigmas = np.geomspace(80, 0.01, 60).tolist()
    keys = jax.random.split(jax.random.key(5), 61)
    levels = jnp.asarray(choose_levels(Consistency(), KarrasSchedule(), 40, sigmas=sigmas), jnp.float32)
    pair = jnp.broadcast_to(value, (2, 64, 2, 1))
    found = edit(exact, Mask(known), pair, levels, lambda i: jax.random.normal(keys[i], pair.shape))
    assert float(jnp.abs(found - pair).max()) < 0.05


def test_initial_x_of_the_five_operators():
    """With the denoiser x / 4, one step returns the initial x, divided by 4."""
    noise = jnp.full(X.shape, 0.25)

    def after_one_step(operator):
        levels = jnp.asarray([0.5, 0.002], jnp.float32)
        return edit(lambda x, sigma: x / 4, operator, X, levels, lambda index: noise)

    np.testing.assert_allclose(after_one_step(Strokes()), (X + 0.125) / 4, atol=1e-6)
    np.testing.assert_allclose(after_one_step(Noisy()), X / 4, atol=1e-6)
    for operator in (Mask(KNOWN), Luma(), PatchMean(2)):
        start = (operator.project(X) + 0.125) / 4
        np.testing.assert_allclose(after_one_step(operator), operator.replace(X, start), atol=1e-6)


PICTURES = np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
HALF = np.zeros((3, 8, 8, 1), bool)
HALF[:, :, :4] = True


def edits(batch_size, devices, variants=3, operator=Mask(HALF), pictures=PICTURES):  # noqa: B008  a value
    parts = edit_batches(
        TOY,
        operator,
        TOY_PARAMS,
        (80.0, 3.0, 0.002),
        variant_keys(jax.random.key(3), len(pictures), variants),
        pictures,
        np.arange(len(pictures), dtype=np.int32),
        batch_size=batch_size,
        parallelism=DataMesh(devices) if devices > 1 else OneDevice(),
    )
    return np.concatenate(list(parts))


def test_edits_do_not_depend_on_batches_devices_or_other_variants():
    reference = edits(9, 1)
    np.testing.assert_allclose(edits(4, 1), reference, atol=1e-5)
    np.testing.assert_allclose(edits(8, 8), reference, atol=1e-5)
    fewer = edits(9, 1, variants=2).reshape(3, 2, 8, 8, 3)
    np.testing.assert_allclose(fewer, reference.reshape(3, 3, 8, 8, 3)[:, :2], atol=1e-5)
    alone = edits(9, 1, operator=Mask(HALF[:1]), pictures=PICTURES[:1])
    np.testing.assert_allclose(alone, reference[:3], atol=1e-5)
    apart = reference.reshape(9, -1)
    assert min(np.abs(a - b).max() for i, a in enumerate(apart) for b in apart[:i]) > 0.1


def test_keys_of_edits_differ_from_keys_of_images():
    both = np.concatenate(
        [
            jax.random.key_data(keys)
            for keys in (variant_keys(jax.random.key(0), 4, 4), image_keys(jax.random.key(0), np.arange(16)))
        ]
    )
    assert len(np.unique(both, axis=0)) == 32


def test_slerp_preserves_the_distribution_and_the_ends():
    one, two = (normal_per_image(jax.random.split(jax.random.key(seed), 5), (32, 32, 3)) for seed in (0, 1))
    middle = slerp(one, two, jnp.array([0.0, 0.25, 0.5, 0.75, 1.0]))
    np.testing.assert_allclose(middle[0], one[0], atol=1e-5)
    np.testing.assert_allclose(middle[-1], two[-1], atol=1e-5)
    np.testing.assert_allclose(jnp.std(middle, axis=(1, 2, 3)), 1, atol=0.03)
    np.testing.assert_allclose(slerp(one, one, jnp.full(5, 0.3)), one, atol=1e-5)
    np.testing.assert_allclose(slerp(one, 2 * one, jnp.full(5, 0.5)), 1.5 * one, atol=1e-5)


def test_interpolation_starts_and_ends_with_the_images_of_the_keys():
    levels, three, four = (80.0, 3.0, 0.002), jax.random.key(3), jax.random.key(4)
    labels = np.zeros(5, np.int32)
    sampler = Consistency()
    frames = slerp_batches(TOY, sampler, TOY_PARAMS, levels, three, four, labels, frames=5, batch_size=8)
    first, *_, last = np.concatenate(list(frames))
    for key, frame in ((three, first), (four, last)):
        (sampled,) = generate(TOY, sampler, TOY_PARAMS, levels, key, 1, labels[:1], batch_size=1)
        np.testing.assert_allclose(sampled[0], frame, atol=1e-4)


def test_blends_are_linear():
    np.testing.assert_allclose(blend(PICTURES[0], PICTURES[1], 5)[[0, 4]], PICTURES[:2], atol=1e-6)
    np.testing.assert_allclose(blend(PICTURES[0], PICTURES[1], 5)[2], PICTURES[:2].mean(0), atol=1e-6)


def test_edits_of_a_model():
    """Denoising is the consistency function; interpolation between equal images gives equal frames."""
    noisy = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    denoised = MODEL.edit(0, noisy, Noisy(), labels=2, sigmas=(1.0,))
    np.testing.assert_allclose(denoised, np.clip(MODEL.denoise(noisy, 1.0, 2), -1, 1), atol=1e-5)
    same = MODEL.interpolate_images(0, PICTURES[0], PICTURES[0], 3, labels=0, sigmas=(2.0,))
    np.testing.assert_allclose(same, np.repeat(same[:1], 3, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (Luma(), (1, 8, 8, 1), "Expected RGB images"),
        (PatchMean(3), (1, 8, 8, 3), "use one of 2, 4, 8"),
        (Mask(KNOWN), (3, 8, 8, 3), r"Expected a mask \[3, 8, 8, 1\] .* got \[3, 12, 8, 1\]"),
    ],
)
def test_operators_refuse_other_shapes(operator, shape, message):
    with pytest.raises(InputError, match=message):
        operator.check(shape)


@pytest.mark.parametrize("size", [0, -1, True])
def test_patch_sizes_are_checked(size):
    with pytest.raises(InputError, match="size of a patch"):
        PatchMean(size)


@pytest.mark.parametrize(
    ("images", "asked", "message"),
    [
        (PICTURES[:, :4], {}, r"\[b, 8, 8, 3\], got \[3, 4, 8, 3\]"),
        (PICTURES * 2, {}, r"\[-1, 1\], got values up to"),
        (PICTURES * np.nan, {}, "finite"),
        (PICTURES, {"labels": None}, r"labels in \[0, 2\]"),
        (PICTURES, {"variants": 0}, "variants must be"),
        (PICTURES, {"operator": PatchMean(5)}, "use one of 2, 4, 8"),
        (PICTURES, {"operator": Noisy()}, "Expected sigmas"),
        (PICTURES, {"sigmas": (1.0, 2.0)}, "must descend"),
        (PICTURES, {"guidance": 2}, "cannot be guided in sampling"),
        (PICTURES, {"sampler": "heun"}, "There is no argument 'sampler'. Noise levels are given as one of steps, "),
        (PICTURES, {"clip": None}, "There is no argument 'clip'"),
        (PICTURES, {"guide": MODEL}, "There is no argument 'guide'"),
    ],
)
def test_invalid_edits_are_refused(images, asked, message):
    asked = {"operator": Luma(), "labels": 0, **asked}
    with pytest.raises(InputError, match=message):
        MODEL.edit(0, images, **asked)


def test_denoisers_do_not_edit():
    teacher = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, consistency=False))
    with pytest.raises(InputError, match="got a denoiser"):
        teacher.edit(0, PICTURES, Luma(), labels=0)
