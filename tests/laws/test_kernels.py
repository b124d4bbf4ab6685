"""The C++ CPU kernels compute the same values and derivatives as XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cm_jax import kernels
from cm_jax.kernels import building
from cm_jax.networks.operations import attend, convolve_3x3, group_norm, multiply
from tests.support import SMALL, random_params, relative

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="No C++ compiler.")
pytestmark = needs_compiler


def normal(seed, *shape):
    """From NumPy, because JAX compiles a program for each shape."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def convolution(size=(9, 7), channels=(32, 48), batch=2):
    return convolve_3x3, (normal(0, batch, *size, channels[0]), normal(1, 3, 3, *channels) / channels[0] ** 0.5 / 3)


def product(pixels=(5, 7), channels=(32, 48), batch=2):
    return multiply, (normal(0, batch, *pixels, channels[0]), normal(1, *channels) / channels[0] ** 0.5)


def norm(size=(9, 7), channels=64, groups=16, silu=True, batch=2):
    function = functools.partial(group_norm, groups=groups, epsilon=1e-5, silu=silu)
    return function, (3 + 2 * normal(0, batch, *size, channels), *(normal(i, batch, channels) for i in (1, 2, 3)))


def attention(pixels=48, heads=2, width=32, batch=2):
    return functools.partial(attend, heads=heads), (normal(0, batch, pixels, 3 * heads * width),)


CASES = {
    "convolution": convolution(),
    "convolution with incomplete tiles": convolution((4, 5)),
    "convolution of many tiles": convolution((64, 32), (16, 16)),
    "convolution of many channels": convolution((8, 8), (208, 256)),
    "product": product(),
    "product of many pixels": product((40, 30), (16, 208)),
    "norm and SiLU": norm(),
    "norm without SiLU, groups narrower than vectors": norm((8, 8), 96, 32, silu=False),
    "norm with one group per channel": norm((3, 3), 32, 32),
    "attention": attention(),
    "attention with one head": attention(16, 1, 64),
}


ONE_PER_KERNEL = ("convolution", "product", "norm and SiLU", "attention")
"""One case for each kernel."""


def exact(function, *args):
    """The result of XLA in double precision, which the kernels do not support."""
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda arg: np.asarray(arg, np.float64), args)
        return jax.tree.map(np.asarray, jax.jit(function)(*doubles))


def kernels_called(function, *args):
    """Names of the C++ functions that a compiled program calls."""
    text = jax.jit(function).lower(*args).as_text()
    return {name for name in building.TARGETS if f"@{name}(" in text or f'"{name}"' in text}


def close(values, expected, bound):
    """Whether all differences are below `bound` relative to the largest value of all arrays.

    One scale for all, because some gradients are zero up to rounding.
    """
    scale = max(np.abs(each).max() for each in jax.tree.leaves(expected))
    return all(
        np.abs(a - b).max() < bound * scale
        for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_values(case):
    function, args = CASES[case]
    assert relative(jax.jit(function)(*args), exact(function, *args)) < 8e-6


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    function, args = CASES[case]

    def energy(*args):
        return jnp.sum(jnp.sin(function(*args)))

    argnums = tuple(range(len(args)))
    gradient = jax.jit(jax.grad(energy, argnums))
    assert close(gradient(*args), exact(jax.grad(energy, argnums), *args), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_forward_mode(case):
    function, args = CASES[case]
    directions = tuple(normal(10 + i, *arg.shape) for i, arg in enumerate(args))
    _, values = jax.jit(lambda a, d: jax.jvp(function, a, d))(args, directions)
    _, expected = exact(lambda *both: jax.jvp(function, both[: len(args)], both[len(args) :]), *args, *directions)
    assert relative(values, expected) < 1e-5


@pytest.mark.parametrize("case", ONE_PER_KERNEL)
def test_second_derivatives(case):
    """Reverse over reverse mode, and reverse over forward mode."""
    function, args = CASES[case]

    def nonlinear(*args):
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), 0)(*args)
        tangent = jax.jvp(function, args, tuple(0.5 * arg for arg in args))[1]
        return jnp.sum(jnp.square(gradient)) + jnp.sum(jnp.cos(tangent))

    gradient = jax.grad(nonlinear, tuple(range(len(args))))
    assert close(jax.jit(gradient)(*args), exact(gradient, *args), 5e-5)


@pytest.mark.parametrize("case", ONE_PER_KERNEL)
@pytest.mark.parametrize("mapped_args", ["first", "all", "last"])
def test_vmap(case, mapped_args):
    function, args = CASES[case]
    mapped = {"first": [0], "all": range(len(args)), "last": [len(args) - 1]}[mapped_args]
    axes = [1 if i in mapped else None for i in range(len(args))]
    stacked = [arg if axis is None else np.stack([arg, arg + 1, -arg], 1) for arg, axis in zip(args, axes, strict=True)]

    def both(*args):
        return function(*args), jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), len(args) - 1)(*args)

    together, alone = jax.jit(jax.vmap(both, axes))(*stacked), jax.jit(both)
    for i in range(3):
        one = [arg if axis is None else arg[:, i] for arg, axis in zip(stacked, axes, strict=True)]
        assert close(jax.tree.map(lambda a, i=i: a[i], together), alone(*one), 1e-5)


def test_training_a_network_calls_every_kernel_and_agrees_with_xla():
    x, time, labels = normal(0, 2, 16, 16, 3), jnp.array([100.0, -300.0]), jnp.array([3, 8])

    def energy(params, x):
        return jnp.sum(jnp.square(SMALL.predict(params, x, time, labels)))

    params = random_params(SMALL)
    assert kernels_called(jax.grad(energy), params, x) == set(building.TARGETS)
    values = jax.jit(jax.grad(energy))(params, x)
    with kernels.off():
        assert not kernels_called(jax.grad(lambda *args: energy(*args)), params, x)
        expected = jax.jit(jax.grad(lambda *args: energy(*args)))(params, x)
    assert close(values, expected, 2e-5)


def test_derivatives_are_bitwise_reproducible():
    """The order of sums does not depend on threads."""
    function, args = convolution((33, 31), (48, 96), 5)
    gradient = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1)))
    first = gradient(*args)
    for _ in range(5):
        for again, before in zip(gradient(*args), first, strict=True):
            np.testing.assert_array_equal(again, before)


def test_images_of_a_batch_are_independent():
    for case in ("convolution", "norm and SiLU", "attention"):
        function, (x, *rest) = CASES[case]
        rows = [arg[:1] if case == "norm and SiLU" else arg for arg in rest]
        np.testing.assert_allclose(jax.jit(function)(x, *rest)[:1], jax.jit(function)(x[:1], *rows), atol=1e-6)


def test_nonfinite_values_give_nonfinite_outputs():
    for case in CASES:
        function, (x, *rest) = CASES[case]
        for bad in (np.nan, np.inf):
            damaged = x.copy()
            damaged[(0,) * x.ndim] = bad
            assert not np.isfinite(jax.jit(function)(damaged, *rest)).all(), case


def test_partitioned_programs_use_xla():
    function, (x, kernel) = convolution(batch=8)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert kernels_called(function, x, kernel)
    assert not kernels_called(function, placed, jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())))
    assert relative(jax.jit(function)(placed, kernel), exact(function, x, kernel)) < 8e-6


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", ONE_PER_KERNEL)
def test_shard_map_checks_varying_axes(case):
    """The gradient of a replicated array is the sum over the devices."""
    function, (x, *rest) = CASES[case]
    args = (x, *(arg[:1] if case == "norm and SiLU" else arg for arg in rest))
    gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), tuple(range(len(args))))
    specs = (PartitionSpec("data"), *[PartitionSpec()] * len(rest))
    mapped = jax.shard_map(gradient, mesh=Mesh(np.array(jax.devices()[:2]), ("data",)), in_specs=specs, out_specs=specs)
    assert kernels_called(mapped, *args)
    assert close(jax.jit(mapped)(*args), jax.jit(gradient)(*args), 1e-5)


def test_arrays_on_explicit_meshes_use_xla():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Explicit,))
    function, (x, matrix) = product()
    gradient = jax.grad(lambda matrix, x: jnp.sum(jnp.sin(function(x, matrix))))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(gradient)(matrix, placed)
    assert relative(found, jax.jit(gradient)(matrix, x)) < 1e-5


def test_pmap_uses_the_kernels_on_every_device():
    function, (x, kernel) = convolution(batch=8)
    apart = jax.pmap(function, in_axes=(0, None))(x.reshape(8, 1, *x.shape[1:]), kernel)
    assert relative(apart.reshape(8, *x.shape[1:3], -1), exact(function, x, kernel)) < 8e-6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ONE_PER_KERNEL)
def test_half_precision_rounds_the_values_and_gradients_of_float32(case, precision):
    function, args = CASES[case]

    def both(*args):
        values, transpose = jax.vjp(function, *args)
        return values, *transpose(values)

    halves = tuple(arg.astype(precision) for arg in args)
    assert kernels_called(both, *halves) == kernels_called(both, *args) != set()
    first, *gradients = jax.jit(both)(*halves)
    widened = tuple(arg.astype(np.float32) for arg in halves)
    values, transpose = jax.vjp(function, *widened)
    np.testing.assert_array_equal(first, values.astype(precision))
    expected = transpose(first.astype(jnp.float32))
    for gradient, each in zip(gradients, expected, strict=True):
        assert gradient.dtype == precision
        np.testing.assert_array_equal(gradient, each.astype(precision))


def test_unsupported_precisions_channels_and_sizes_use_xla():
    function, (x, kernel) = convolution()
    with jax.enable_x64(True):
        assert not kernels_called(function, x.astype(np.float64), kernel)
    assert not kernels_called(function, x[..., :5], kernel[:, :, :5])
    assert not kernels_called(function, x[:, :2, :2], kernel)


@pytest.mark.parametrize("case", ONE_PER_KERNEL)
def test_batches_without_images(case):
    """As such, and mapped by vmap."""
    function, (x, *rest) = CASES[case]

    def gradients(x, *rest):
        return function(x, *rest), jax.grad(lambda *args: jnp.sum(function(*args)))(x, *rest)

    rows = [arg[:0] if case == "norm and SiLU" else arg for arg in rest]
    alone = jax.jit(gradients)(x[:0], *rows)
    mapped = jax.jit(jax.vmap(gradients, (0, *[None] * len(rest))))(x[None][:0], *rest)
    assert all(found.size == 0 for found in (*alone, *mapped))


MISMATCHED = {
    "kernel of other channels": (convolve_3x3, (2, 8, 8, 32), (3, 3, 16, 16)),
    "kernel of 5x5 pixels": (convolve_3x3, (2, 8, 8, 32), (5, 5, 32, 32)),
    "image without a batch": (convolve_3x3, (8, 8, 32), (3, 3, 32, 32)),
    "matrix of other channels": (multiply, (2, 9, 32), (16, 32)),
    "gain for three images": (norm()[0], (2, 9, 7, 64), None, (3, 64), (2, 64)),
    "bias of other channels": (norm()[0], (2, 9, 7, 64), None, (2, 64), (2, 32)),
    "norm of arrays without columns": (norm()[0], (2, 9, 64), None, (2, 64), (2, 64)),
    "heads that do not divide the channels": (functools.partial(attend, heads=17), (2, 16, 3 * 288)),
    "attention of images": (functools.partial(attend, heads=1), (2, 16, 96, 16)),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", MISMATCHED)
def test_arrays_of_other_shapes_are_refused(case):
    """The C++ functions would read beyond their ends."""
    function, *shapes = MISMATCHED[case]
    arrays = [shape and jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    with pytest.raises((ValueError, TypeError)):
        jax.eval_shape(function, *arrays)


@pytest.mark.usefixtures("unchecked_types")
def test_norm_broadcasts_gain_and_bias_over_images():
    function, (x, *rest) = norm()
    alike = [np.concatenate([arg[:1]] * 2) for arg in rest]
    np.testing.assert_array_equal(jax.jit(function)(x, *(arg[:1] for arg in rest)), jax.jit(function)(x, *alike))


def test_without_jit(caplog):
    """Eager calls compile once, `disable_jit` has the same values, and `debug_nans` raises its own error."""
    function, args = convolution()
    arrays = [jnp.asarray(arg) for arg in args]
    expected = function(*arrays)
    with jax.log_compiles():
        function(*arrays)
    assert not caplog.messages
    with jax.disable_jit():
        np.testing.assert_array_equal(function(*arrays), expected)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(function)(*(jnp.inf * each for each in arrays))
