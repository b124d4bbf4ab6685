"""The kernels for CPUs in C++ are the functions that XLA computes, with all their derivatives."""

import functools
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cm_jax import kernels
from cm_jax.kernels import building
from cm_jax.networks.operations import attend, convolve_3x3, group_norm, multiply
from tests.support import ROOT, SMALL, random_params, relative

needs_a_compiler = pytest.mark.skipif(not kernels.available(), reason="There is no C++ compiler.")
pytestmark = needs_a_compiler


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


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
    "convolution of one pixel more than tiles have": convolution((4, 5)),
    "convolution of many tiles": convolution((64, 32), (16, 16)),
    "convolution of many channels": convolution((8, 8), (208, 256)),
    "product": product(),
    "product of many pixels": product((40, 30), (16, 208)),
    "norm and SiLU": norm(),
    "norm alone, groups that are no vectors": norm((8, 8), 96, 32, silu=False),
    "norm with one group a channel": norm((3, 3), 32, 32),
    "attention": attention(),
    "attention, one head": attention(16, 1, 64),
}


EACH = ("convolution", "product", "norm and SiLU", "attention")
"""A case of each kind."""


def exact(function, *args):
    """In double precision, which is XLA's."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*[jnp.asarray(arg, jnp.float64) for arg in args]))


def calls(function, *args):
    """The library's functions in a program."""
    text = jax.jit(function).lower(*args).as_text()
    return {name for name in building.TARGETS if f"@{name}(" in text or f'"{name}"' in text}


def near(ours, theirs, bound):
    """Relative to the largest value of all: a gradient that is nothing but rounding has none of its own."""
    scale = max(np.abs(each).max() for each in jax.tree.leaves(theirs))
    return all(
        np.abs(a - b).max() < bound * scale for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
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

    everything = tuple(range(len(args)))
    gradient = jax.jit(jax.grad(energy, everything))
    assert near(gradient(*args), exact(jax.grad(energy, everything), *args), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_forward_mode(case):
    function, args = CASES[case]
    directions = tuple(normal(10 + i, *arg.shape) for i, arg in enumerate(args))
    _, ours = jax.jit(lambda a, d: jax.jvp(function, a, d))(args, directions)
    _, theirs = exact(lambda *both: jax.jvp(function, both[: len(args)], both[len(args) :]), *args, *directions)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("case", EACH)
def test_second_derivatives(case):
    """Of reverse over reverse, and of reverse over forward."""
    function, args = CASES[case]

    def slope(*args):
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), 0)(*args)
        ema_update = jax.jvp(function, args, tuple(0.5 * arg for arg in args))[1]
        return jnp.sum(jnp.square(gradient)) + jnp.sum(jnp.cos(ema_update))

    gradient = jax.grad(slope, tuple(range(len(args))))
    assert near(jax.jit(gradient)(*args), exact(gradient, *args), 5e-5)


@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize("which", ["first", "all", "last"])
def test_mapped(case, which):
    function, args = CASES[case]
    mapped = {"first": [0], "all": range(len(args)), "last": [len(args) - 1]}[which]
    axes = [1 if i in mapped else None for i in range(len(args))]
    several = [
        arg if axis is None else jnp.stack([arg, arg + 1, -arg], 1) for arg, axis in zip(args, axes, strict=True)
    ]

    def both(*args):
        return function(*args), jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), len(args) - 1)(*args)

    together = jax.jit(jax.vmap(both, axes))(*several)
    for i in range(3):
        one = [arg if axis is None else arg[:, i] for arg, axis in zip(several, axes, strict=True)]
        assert near(jax.tree.map(lambda a, i=i: a[i], together), both(*one), 1e-5)


def test_a_network_in_training_is_made_of_them():
    x, time, labels = normal(0, 2, 16, 16, 3), jnp.array([100.0, -300.0]), jnp.array([3, 8])

    def energy(params, x):
        return jnp.sum(jnp.square(SMALL.predict(params, x, time, labels)))

    params = random_params(SMALL)
    assert calls(jax.grad(energy), params, x) == set(building.TARGETS)
    ours = jax.jit(jax.grad(energy))(params, x)
    with kernels.off():
        assert not calls(jax.grad(lambda *args: energy(*args)), params, x)
        theirs = jax.jit(jax.grad(lambda *args: energy(*args)))(params, x)
    assert near(ours, theirs, 2e-5)


def test_the_same_to_the_last_bit_every_time():
    """Sums have one order, whichever thread takes which task."""
    function, args = convolution((33, 31), (48, 96), 5)
    gradient = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1)))
    first = gradient(*args)
    for _ in range(5):
        for again, before in zip(gradient(*args), first, strict=True):
            np.testing.assert_array_equal(again, before)


def test_images_do_not_depend_on_their_neighbours():
    for case in ("convolution", "norm and SiLU", "attention"):
        function, (x, *rest) = CASES[case]
        rows = [arg[:1] if case == "norm and SiLU" else arg for arg in rest]
        np.testing.assert_allclose(jax.jit(function)(x, *rest)[:1], jax.jit(function)(x[:1], *rows), atol=1e-6)


def test_nonfinite_values_stay_where_they_can_be_seen():
    for case in CASES:
        function, (x, *rest) = CASES[case]
        for bad in (jnp.nan, jnp.inf):
            assert not np.isfinite(jax.jit(function)(x.at[(0,) * x.ndim].set(bad), *rest)).all(), case


def test_a_program_that_xla_divides_among_devices_has_none():
    function, (x, kernel) = convolution(batch=8)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert calls(function, x, kernel)
    assert not calls(function, placed, jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())))
    assert relative(jax.jit(function)(placed, kernel), exact(function, x, kernel)) < 8e-6


def test_every_device_of_pmap_calls_them():
    function, (x, kernel) = convolution(batch=8)
    apart = jax.pmap(function, in_axes=(0, None))(x.reshape(8, 1, *x.shape[1:]), kernel)
    assert relative(apart.reshape(8, *x.shape[1:3], -1), exact(function, x, kernel)) < 8e-6


def test_other_precisions_and_odd_channels_are_left_to_xla():
    function, (x, kernel) = convolution()
    assert not calls(function, x.astype(jnp.bfloat16), kernel)
    assert not calls(function, x[..., :5], kernel[:, :, :5])
    assert not calls(function, x[:, :2, :2], kernel)


SCRIPT = """
import logging, sys
logging.basicConfig()
from cm_jax import kernels
print(kernels.available())
"""


def tried(tmp_path, **environment):
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=own, capture_output=True, text=True, check=True)


def test_a_compiler_that_fails_leaves_xlas_forms_and_one_warning(tmp_path):
    for compiler, word in (("/no/such/compiler", "No such file"), ("false", "exit status 1")):
        done = tried(tmp_path, CXX=compiler)
        assert done.stdout == "False\n"
        assert done.stderr.count("could not be compiled") == 1
        assert word in done.stderr
    assert not list(tmp_path.rglob("*.so"))


EVERYTHING = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.laws import test_kernels
for case in test_kernels.EACH:
    test_kernels.test_gradients(case)
print(test_kernels.building.lanes())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="The flags are those of x86-64.")
@pytest.mark.parametrize(("flag", "lanes"), [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_processors_with_narrower_vectors(tmp_path, flag, lanes):
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": f"c++ {flag}"}
    done = subprocess.run([sys.executable, "-c", EVERYTHING, str(ROOT)], env=own, capture_output=True, text=True)
    assert done.stdout == f"{lanes}\n", done.stderr


FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from cm_jax import kernels
kept = sys.argv[1] == "kept" and kernels.keep_memory()
step = jax.jit(lambda x: jnp.cumsum(jnp.sin(x)) + 1)
x = jnp.ones(2**24)
for _ in range(3):
    jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    jax.block_until_ready(step(x))
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="It is glibc's memory that is kept.")
def test_kept_memory_is_not_cleared_anew_in_every_step():
    counts = {}
    for way in ("kept", "given back"):
        own = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", FAULTS, way], env=own, capture_output=True, text=True, check=True)
        kept, counts[way] = map(int, done.stdout.split())
        assert kept == (way == "kept")
    assert counts["kept"] < counts["given back"] / 10


def test_it_can_be_switched_off(tmp_path):
    done = tried(tmp_path, CM_JAX_KERNELS="off")
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert not list(tmp_path.rglob("*"))


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    assert tried(tmp_path / "file", TMPDIR=str(tmp_path)).stdout == "True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_images_are_left_to_xla():
    function, (x, kernel) = convolution()
    assert jax.jit(function)(x[:0], kernel).shape == (0, 9, 7, 48)


def test_the_library_is_compiled_once_and_a_damaged_one_anew(tmp_path):
    assert tried(tmp_path).stdout == "True\n"
    (made,) = tmp_path.rglob("*.so")
    assert tried(tmp_path, CXX="c++ -fno-such-flag").stdout == "False\n"
    written = made.stat().st_mtime_ns
    assert tried(tmp_path).stdout == "True\n"
    assert made.stat().st_mtime_ns == written
    made.write_bytes(made.read_bytes()[:1000])
    assert tried(tmp_path).stdout == "True\n"
    assert len(made.read_bytes()) > 1000
