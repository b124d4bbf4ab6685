"""Networks: derivatives, rematerialization, dropout, norms, attention, precision and validation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax import kernels
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, EDM2UNet, SongUNet
from cm_jax.networks.layers import Dense, GroupNorm, downsample, upsample
from cm_jax.networks.operations import attend, convolve_3x3
from cm_jax.types import leaves
from tests.support import SMALL, adm_golden, nhwc, random_params, relative

X = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
TIME = jnp.array([100.0, -300.0])
LABELS = jnp.array([3, 8])
PARAMS = random_params(SMALL)


def plain_norm(channels):
    return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}


def predict(network, x=X, keys=None, params=PARAMS):
    return jax.jit(network.predict)(params, x, TIME, LABELS, keys)


def test_forward_and_reverse_derivatives_agree():
    def energy(x):
        return jnp.sum(SMALL.predict(PARAMS, x, TIME, LABELS) ** 2)

    direction = jax.random.normal(jax.random.key(2), X.shape)
    forward, gradient = jax.jit(lambda x: (jax.jvp(energy, (x,), (direction,))[1], jax.grad(energy)(x)))(X)
    assert forward == pytest.approx(float(jnp.vdot(gradient, direction)), rel=1e-4)


def test_rematerialization_changes_neither_parameter_names_nor_values():
    remat = dataclasses.replace(SMALL, rematerialize=True)
    assert jax.tree.structure(remat.shapes()) == jax.tree.structure(SMALL.shapes())

    def loss(some, network):
        return jnp.mean(network.predict(PARAMS | some, X, TIME, LABELS) ** 2)

    some = {name: PARAMS[name] for name in ("embedding", "stem")}  # their gradients pass through every block
    plain, again = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(some, net) for net in (SMALL, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)


def test_shapes_belong_to_the_caller_and_the_network():
    changed = SMALL.shapes()
    del changed["stem"]["kernel"]
    assert "kernel" in SMALL.shapes()["stem"]
    wider = dataclasses.replace(SMALL, base_channels=64)
    assert wider.shapes()["stem"]["kernel"].shape == (3, 3, 3, 64)


def test_dropout_needs_keys_and_is_independent_for_each_image():
    network = dataclasses.replace(SMALL, dropout=0.3)
    run, clean = jax.jit(network.predict), predict(SMALL)
    np.testing.assert_array_equal(run(PARAMS, X, TIME, LABELS), clean)
    keys = jax.random.split(jax.random.key(0), 2)
    dropped = run(PARAMS, X, TIME, LABELS, keys)
    assert not np.allclose(dropped, clean, atol=1e-3)
    np.testing.assert_array_equal(dropped, run(PARAMS, X, TIME, LABELS, keys))
    other_batch = run(PARAMS, jnp.stack([X[1], -X[0]]), TIME[::-1], LABELS[::-1], keys[::-1])
    np.testing.assert_allclose(other_batch[0], dropped[1], atol=1e-5)


def test_dropout_keeps_the_mean():
    from cm_jax.networks.layers import dropout

    keys = jax.random.split(jax.random.key(0), 4)
    kept = dropout(jnp.ones((4, 64, 64, 8)), 0.25, keys, layer=3)
    assert kept.mean() == pytest.approx(1, abs=0.01)
    assert (kept == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert not np.array_equal(kept, dropout(jnp.ones((4, 64, 64, 8)), 0.25, keys, layer=4))


@pytest.mark.parametrize(
    "network",
    [
        dataclasses.replace(SMALL, dropout=0.5),
        SongUNet(image_size=16, base_channels=16, channel_mult=(1, 1), blocks_per_level=1, dropout=0.5, classes=10),
    ],
)
def test_dropout_size_limits_dropout_to_small_feature_maps(network):
    """As in iCT and ECT for ImageNet-64. These networks have feature maps of 16 x 16 and 8 x 8 pixels."""
    params, keys = random_params(network), jax.random.split(jax.random.key(0), 2)
    x, labels = jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), jnp.array([1, 2])

    def predict(size, keys):
        return jax.jit(dataclasses.replace(network, dropout_size=size).predict)(params, x, jnp.ones(2), labels, keys)

    everywhere, deepest, nowhere = predict(None, keys), predict(8, keys), predict(None, None)
    np.testing.assert_array_equal(predict(16, keys), everywhere)
    np.testing.assert_array_equal(predict(7, keys), nowhere)
    assert relative(deepest, nowhere) > 1e-2
    assert relative(deepest, everywhere) > 1e-2


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_norm_in_float32_is_accurate_for_large_means(offset):
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 64)).astype(np.float32) + np.float32(offset)
    groups = x.astype(np.float64).reshape(2, 64, 32, 2)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    exact = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    values = GroupNorm().apply({"params": plain_norm(64)}, jnp.asarray(x))
    np.testing.assert_allclose(values, exact, atol=2e-6 + 1e-6 * offset)


@pytest.mark.parametrize("pixel", [(0, 0), (100, 37)])
def test_group_norm_is_accurate_with_one_very_large_pixel(pixel):
    x = np.random.default_rng(0).standard_normal((1, 256, 256, 32)).astype(np.float32)
    x[:, pixel[0], pixel[1]] = 1e4
    exact = (x - x.mean((1, 2), np.float64)) / np.sqrt(x.astype(np.float64).var((1, 2)) + 1e-5)
    values = np.asarray(GroupNorm().apply({"params": plain_norm(x.shape[-1])}, jnp.asarray(x)))
    assert relative(values, exact) < 1e-6
    typical = np.s_[:, 200:, 200:]
    assert relative(values[typical], exact[typical]) < 1e-5


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_group_norm_in_half_precision_is_accurate_to_the_rounding_of_input_and_output(
    each_implementation, mean, dtype, rounding
):
    given = np.random.default_rng(0).standard_normal((2, 16, 16, 64)).astype(np.float32) + np.float32(mean)
    x = jnp.asarray(given, dtype)

    def exact(values):
        groups = np.asarray(values, np.float64).reshape(2, 256, 32, 2)
        average, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        return ((groups - average) / np.sqrt(variance + 1e-5)).reshape(x.shape)

    of_input = np.abs(exact(given) - exact(x)).max()
    of_output = rounding * np.abs(exact(x)).max()
    values = np.asarray(GroupNorm().apply({"params": plain_norm(64)}, x), np.float64)
    assert np.abs(values - exact(x)).max() < of_input + of_output


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_a_norm_and_a_dense_layer_of_parts_are_those_of_the_concatenated_features(dtype, bound):
    x, more = (jax.random.normal(jax.random.key(c), (2, 4, 4, c)).astype(dtype) + 1 for c in (40, 24))
    joined, dense = jnp.concatenate([x, more], axis=-1), Dense(32, dtype=dtype)
    weights = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)) / 8, "bias": jnp.arange(32.0)}
    with kernels.off():
        norm = [GroupNorm().apply({"params": plain_norm(64)}, *parts, silu=True) for parts in ([x, more], [joined])]
        product = [dense.apply({"params": weights}, *parts) for parts in ([x, more], [joined])]
    for apart, together in (norm, product):
        assert apart.shape == together.shape
        assert relative(np.asarray(apart, np.float32), np.asarray(together, np.float32)) < bound


def test_downsampling_averages_and_upsampling_repeats():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(downsample(upsample(x)), x)
    np.testing.assert_array_equal(upsample(x)[0, :2, :2, 0], [[0, 0], [0, 0]])


def test_attention_equals_softmax_of_scaled_products():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))
    qkv = jnp.concatenate([each.reshape(2, 5, 24) for each in (query, key, value)], axis=-1)
    values = attend(qkv, heads=3).reshape(2, 5, 3, 8)
    for head in range(3):
        scores = np.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head]) / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(values[:, :, head], weights @ np.asarray(value)[:, :, head], atol=1e-5)


def test_cudnn_attention_is_an_error_where_unsupported_and_auto_falls_back():
    qkv = jnp.ones((2, 64, 3 * 4 * 64), jnp.bfloat16)
    for given in (qkv, qkv.astype(jnp.float32)):
        with pytest.raises(InputError, match=f"cudnn.*NVIDIA GPU.*{given.dtype}.*64 channels on cpu"):
            jax.jit(lambda x: attend(x, 4, "cudnn")).lower(given)
    np.testing.assert_array_equal(attend(qkv, 4, "auto"), attend(qkv, 4, "plain"))


def test_a_network_trained_with_cudnn_samples_in_any_precision_on_any_device():
    network = dataclasses.replace(SMALL, attention="cudnn", precision="bfloat16").at_precision("float32")
    np.testing.assert_array_equal(predict(network), predict(SMALL))
    assert dataclasses.replace(SMALL, attention="plain").at_precision("bfloat16").attention == "plain"


# Every product rounds to 8 bits (bfloat16) or 11 bits (float16); measured at most 1.9e-2 and 2.0e-3.
@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 4e-2), ("float16", 5e-3)])
@pytest.mark.parametrize("name", ["class_cond", "conv_resample", "unconditional"])
def test_half_precision_is_near_float32(each_implementation, precision, bound, name):
    network, params, golden = adm_golden(name)
    network = dataclasses.replace(network, precision=precision)
    labels = jnp.asarray(golden["y"]) if "y" in golden else None
    arguments = (jnp.asarray(nhwc(golden["x"])), jnp.asarray(golden["timesteps"]), labels)
    for given in (network.prepare(params), params)[: 2 if name == "class_cond" else 1]:
        out = jax.jit(network.predict)(given, *arguments)
        assert out.dtype == jnp.float32
        assert bound / 100 < relative(out, nhwc(golden["out"])) < bound


def test_prepare_casts_convolutions_and_attention_to_half_precision_only():
    network = dataclasses.replace(SMALL, precision="bfloat16")
    prepared = network.prepare(PARAMS)
    block = prepared["down_1_0"]
    for leaf in (block["residual"]["conv_1"]["kernel"], block["attention"]["qkv"]["bias"], prepared["stem"]["kernel"]):
        assert leaf.dtype == jnp.bfloat16
    for leaf in (
        block["residual"]["embedding"]["kernel"],
        block["residual"]["norm_1"]["scale"],
        prepared["embedding"]["table"],
        prepared["head"]["output"]["kernel"],
    ):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("given", [np.float16, np.float32])
def test_casting_parameters_on_the_host_equals_casting_on_a_device(precision, given):
    network = dataclasses.replace(SMALL, precision=precision)
    host = jax.tree.map(lambda leaf: np.asarray(leaf, given), PARAMS)
    placed = jax.tree.map(jnp.asarray, host)
    for (path, one), (_, other) in zip(leaves(network.prepare(host)), leaves(network.prepare(placed)), strict=True):
        assert one.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 15}, "2 levels downsample 1 times by 2, so image_size must be a multiple of 2"),
        ({"base_channels": 48}, "norm groups"),
        ({"head_dim": 24}, "do not split"),
        ({"head_dim": None}, "not both or neither"),
        ({"heads": 2}, "not both or neither"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout_size": 0}, "dropout_size must be positive"),
        ({"classes": 0}, "classes"),
        ({"channel_mult": ()}, "must lie in"),
        ({"channel_mult": (1, float("nan"))}, "channel_mult must"),
        ({"variant": "edm", "base_channels": 132}, "132 channels.*norm groups"),
        ({"variant": "edm", "base_channels": 2}, "2 channels.*norm groups"),
        ({"variant": "edm", "base_channels": 64, "head_dim": 40}, "128 channels.*3 attention heads"),
    ],
)
def test_invalid_networks_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_channels": 100}, "200 channels.*3 attention heads"),
        ({"base_channels": 16, "channel_mult": (1, 0.01)}, "channel_mult must"),
    ],
)
def test_magnitude_preserving_networks_that_cannot_be_built_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EDM2UNet(**{"channel_mult": (1, 2), "attention_factors": (1, 2), **settings})


def test_the_middle_block_has_attention_without_attention_factors():
    network = ADMUNet(
        image_size=8,
        base_channels=32,
        channel_mult=(1, 1),
        blocks_per_level=1,
        attention_factors=(),
        head_dim=32,
        classes=None,
    )
    kinds = [unit.kind for block in network.plan().blocks for unit in block.units]
    assert kinds.count("attention") == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_convolution_of_images_smaller_than_the_kernel(size):
    """Values, both gradients and vmap agree with the XLA convolution in float32."""
    x = jax.random.normal(jax.random.key(0), (3, *size, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 7))
    pull = jax.random.normal(jax.random.key(2), (3, *size, 7))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    expected, back = jax.vjp(plain, x, kernel)
    values, vjp = jax.vjp(convolve_3x3, x, kernel)
    for found, want in zip((values, *vjp(pull)), (expected, *back(pull)), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(convolve_3x3, (0, None))(jnp.stack([x, -x]), kernel)[1], -expected, rtol=1e-5, atol=1e-5
    )


def test_a_parameter_of_the_wrong_shape_is_refused_not_broadcast():
    residual = PARAMS["down_0_0"]["residual"]
    narrow = residual | {"conv_1": residual["conv_1"] | {"bias": jnp.zeros(1)}}
    params = PARAMS | {"down_0_0": PARAMS["down_0_0"] | {"residual": narrow}}
    with pytest.raises(InputError, match=r"down_0_0/residual/conv_1/bias of shape \[\d+\], got \[1\]"):
        SMALL.predict(params, X, TIME, LABELS)
