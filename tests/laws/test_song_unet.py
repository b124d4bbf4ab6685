"""NCSN++ and DDPM++: parameter counts, derivatives, dropout, filters, initial values and validation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.networks.layers import fir_downsample, fir_upsample, pixel_norm, smoothed
from cm_jax.networks.song_unet import DDPMPP, NCSNPP, positional
from cm_jax.types import Network, leaves
from tests.support import random_params

SMALL = SongUNet(image_size=8, base_channels=16, channel_mult=(1, 2), blocks_per_level=1)
VARIANTS = {
    "ncsnpp": SMALL,
    "ddpmpp": dataclasses.replace(SMALL, embedding="positional", resampling="plain", pyramid=False),
    "normalized": dataclasses.replace(SMALL, modulation="normalized", fourier_scale=0.02, classes=3, pyramid=False),
}
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
TIME = jnp.array([1.0, -0.7])
LABELS = jnp.array([2, 0])


def labels(network):
    return None if network.classes is None else LABELS


def predict(network, params, keys=None):
    return jax.jit(network.predict)(params, X, TIME, labels(network), keys)


@pytest.mark.parametrize(
    ("network", "parameters", "tensors"),
    [
        (NCSNPP, 56_395_651, 421),
        (DDPMPP, 55_732_739, 416),
        # iCT-deep: 12 more blocks going down (256 to 256 channels), 12 going up (512 to 256), 4 with attention
        (
            dataclasses.replace(NCSNPP, blocks_per_level=8),
            56_395_651 + 12 * 1_312_512 + 12 * 2_034_176 + 4 * 263_680,
            421 + 12 * 10 + 12 * 12 + 4 * 6,
        ),
        (dataclasses.replace(DDPMPP, classes=10), 55_732_739 + 10 * 128, 417),
        # the embedding layers of the 33 residual blocks are twice as wide: [512, 256] more, with biases
        (dataclasses.replace(DDPMPP, modulation="normalized"), 55_732_739 + 33 * 513 * 256, 416),
    ],
)
def test_parameter_counts(network, parameters, tensors):
    shapes = leaves(network.shapes())
    assert sum(leaf.size for _, leaf in shapes) == parameters
    assert len(shapes) == tensors


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_consistency_function_is_identity_at_sigma_min(network):
    assert isinstance(network, Network)
    assert hash(dataclasses.replace(network, channel_mult=(1.0, 2.0))) == hash(network)
    function = ConsistencyFunction(network, ConsistencyPreconditioning(time_factor=EDM_TIME))
    x = 3 * X
    np.testing.assert_array_equal(jax.jit(function)(random_params(network), x, jnp.full(2, 0.002), labels(network)), x)


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_forward_and_reverse_derivatives_agree_for_images_and_noise_conditioning(network):
    params = random_params(network)

    def energy(x, time):
        return jnp.sum(network.predict(params, x, time, labels(network)) ** 2)

    direction = (jax.random.normal(jax.random.key(2), X.shape), jnp.array([0.3, -1.0]))

    @jax.jit
    def both(x, time):
        return jax.jvp(energy, (x, time), direction)[1], jax.grad(energy, argnums=(0, 1))(x, time)

    forward, gradients = both(X, TIME)
    assert jnp.abs(gradients[1]).min() > 1e-3
    reverse = sum(jnp.vdot(gradient, v) for gradient, v in zip(gradients, direction, strict=True))
    assert forward == pytest.approx(float(reverse), rel=1e-4)


def test_rematerialization_changes_neither_parameter_names_nor_values():
    remat = dataclasses.replace(SMALL, rematerialize=True)
    params = random_params(SMALL)
    assert jax.tree.structure(remat.shapes()) == jax.tree.structure(SMALL.shapes())

    def loss(some, network):
        return jnp.mean(network.predict(params | some, X, TIME) ** 2)

    # the gradients of these pass through every block
    some = {name: params[name] for name in ("embedding", "stem", "down_0_1")}
    plain, again = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(some, net) for net in (SMALL, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
    assert not plain[1]["embedding"]["frequencies"].any()  # fixed parameters have zero gradients
    assert plain[1]["down_0_1"]["pyramid"]["kernel"].any()


def test_dropout_needs_keys_and_is_independent_for_each_image():
    network, params = dataclasses.replace(SMALL, dropout=0.3), random_params(SMALL)
    clean = predict(SMALL, params)
    np.testing.assert_array_equal(predict(network, params), clean)
    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.jit(network.predict)
    dropped = run(params, X, TIME, None, keys)
    assert not np.allclose(dropped, clean, atol=1e-3)
    other_batch = run(params, jnp.stack([X[1], -X[0]]), TIME[::-1], None, keys[::-1])
    np.testing.assert_allclose(other_batch[0], dropped[1], atol=1e-5)


def test_output_depends_on_labels_and_noise_conditioning():
    network, params = VARIANTS["normalized"], random_params(VARIANTS["normalized"])
    run = jax.jit(network.predict)
    first = run(params, X, TIME, LABELS)
    assert not np.allclose(first[0], run(params, X, TIME, jnp.array([1, 0]))[0], atol=1e-4)
    assert not np.allclose(first[0], run(params, X, TIME + 1, LABELS)[0], atol=1e-4)
    with pytest.raises(InputError, match="class-conditional"):
        network.predict(params, X, TIME)


def test_normalized_modulation_is_invariant_to_the_scale_of_its_embedding_layer():
    """pnorm(a v) = pnorm(v): scaling the layer that computes scale and shift does not change the output."""
    network, params = VARIANTS["normalized"], random_params(VARIANTS["normalized"])

    def tenfold(path, leaf):
        names = [key.key for key in path]
        return 10 * leaf if names[-2] == "embedding" and names[0] != "embedding" else leaf

    scaled = jax.tree_util.tree_map_with_path(tenfold, params)
    np.testing.assert_allclose(predict(network, scaled), predict(network, params), atol=1e-4)
    plain = dataclasses.replace(network, modulation="scale_shift")
    assert not np.allclose(predict(plain, scaled), predict(plain, params), atol=1e-2)
    values = jax.random.normal(jax.random.key(0), (3, 50))
    np.testing.assert_allclose(jnp.square(pixel_norm(values)).mean(1), 1, rtol=1e-5)


def test_fir_filters_are_transposes_and_preserve_constants():
    x, y = jax.random.normal(jax.random.key(0), (1, 8, 6, 2)), jax.random.normal(jax.random.key(1), (1, 4, 3, 2))
    # <down(x), y> = <x, up(y)> / 4: the same taps, with sum 1 for downsampling and 4 for upsampling
    assert jnp.vdot(fir_downsample(x), y) == pytest.approx(float(jnp.vdot(x, fir_upsample(y))) / 4, rel=1e-4)
    ones = jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(fir_downsample(ones)[0, 1:-1, 1:-1], 1)
    np.testing.assert_allclose(fir_upsample(ones)[0, 1:-1, 1:-1], 1)
    assert fir_upsample(ones)[0, 0, 0, 0] == 0.75**2  # zero padding
    # a wave of period 4, which a mean of 2 x 2 pixels does not remove
    wave = jnp.broadcast_to(jnp.tile(jnp.array([1.0, 1, -1, -1]), 4)[None, None, :, None], (1, 16, 16, 1))
    assert jnp.abs(fir_downsample(wave)[0, 2:-2, 2:-2]).max() == pytest.approx(0.5)
    np.testing.assert_allclose(smoothed(ones, "plain")[0, 1:-1, 1:-1], 1)


def test_positional_embedding_frequencies():
    embedding = positional(jnp.array([0.5]), 8)
    frequencies = np.array([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    np.testing.assert_allclose(embedding[0], [*np.sin(0.5 * frequencies), *np.cos(0.5 * frequencies)], rtol=1e-5)


def test_initial_values_have_the_variances_of_ncsnpp():
    network = dataclasses.replace(SMALL, base_channels=64, classes=50)
    params = network.initialize(jax.random.key(0))
    block, attention = params["down_1_0"]["residual"], params["down_1_0"]["attention"]
    for kernel, share, window, inside, outside in [
        (block["conv_1"]["kernel"], 1, 9, 64, 128),
        (block["conv_2"]["kernel"], 1e-10, 9, 128, 128),
        (block["skip"]["kernel"], 1, 1, 64, 128),
        (attention["qkv"]["kernel"], 0.1, 1, 128, 128),
        (params["embedding"]["table"], 50, 1, 50, 128),
    ]:
        variance = share / (window * (inside + outside) / 2)
        assert kernel.std() == pytest.approx(variance**0.5, rel=0.05)
        assert jnp.abs(kernel).max() <= (3 * variance) ** 0.5
    assert params["embedding"]["frequencies"].std() == pytest.approx(16, rel=0.25)
    assert not block["conv_1"]["bias"].any()
    assert (block["norm_1"]["scale"] == 1).all()
    out = jax.jit(network.predict)(params, X, TIME, LABELS)
    assert 0 < jnp.abs(out).max() < 1e-3
    assert all(leaf.dtype == jnp.float32 for _, leaf in leaves(params))


def test_bfloat16_is_near_float32(each_implementation):
    params = random_params(SMALL)
    half = SMALL.at_precision("bfloat16")
    prepared = half.prepare(params)
    assert prepared["down_0_1"]["pyramid"]["kernel"].dtype == jnp.bfloat16
    assert prepared["embedding"]["frequencies"].dtype == jnp.float32
    out, exact = predict(half, prepared), predict(SMALL, params)
    assert out.dtype == jnp.float32
    assert 1e-4 < jnp.abs(out - exact).max() / jnp.abs(exact).max() < 5e-2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 9}, "multiple of 2"),
        ({"base_channels": 3}, "at least 4"),
        ({"base_channels": 4 * 33}, "norm groups"),
        ({"embedding": "positional", "base_channels": 5}, "even number"),
        ({"fourier_scale": 0.0}, "fourier_scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"classes": 0}, "classes"),
        ({"channel_mult": ()}, "number of levels must lie in"),
    ],
)
def test_invalid_networks_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **wrong)
