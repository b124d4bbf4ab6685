"""NCSN++ and DDPM++ give the numbers that the original JAX program gave (goldens/FORMULA_WEIGHTS.md, jcm)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.arrays import per_image
from cm_jax.consistency_function import ConsistencyFunction
from cm_jax.conversion import jcm
from cm_jax.conversion.rules import LazyTensor, to_ours
from cm_jax.networks import SongUNet
from cm_jax.networks.blocks import SmoothedConvolution
from cm_jax.networks.fir import fir_downsample, fir_upsample
from cm_jax.noise_levels import EDM_TIME, KarrasGrid
from cm_jax.preconditioning import BoundaryScaling, EDMScaling
from tests.parity import jcm_float64
from tests.support import DATA, relative

BOUND = 1e-5
GOLDEN = DATA / "jcm" / "golden.npz"
VE = SongUNet(image_size=16, width=32, multipliers=(1, 2), blocks_per_level=1)
NETWORKS = {
    "ve": VE,
    "vp": SongUNet(**{**vars(VE), "embedding": "positional", "resampling": "plain", "pyramid": False}),
}
SCALINGS = {"denoiser": EDMScaling(time_factor=EDM_TIME), "distiller": BoundaryScaling(time_factor=EDM_TIME)}


@functools.cache
def tensors(name):
    """The original's parameters by the formula."""
    shapes = json.loads((DATA / "jcm" / f"tiny_{name}.json").read_text())
    return {path: formula(path, position, tuple(shapes[path])) for position, path in enumerate(sorted(shapes))}


def formula(path, position, shape):
    *_, layer, leaf = path.split("/")
    wave = np.sin(0.7 * np.arange(np.prod(shape)) + 1.3 * position).reshape(shape)
    if leaf == "scale":
        wave = 1 + 0.1 * wave
    elif leaf in ("bias", "b"):
        wave = 0.1 * wave
    elif len(shape) == 1:
        wave = 2 * wave
    else:
        wave = wave / np.sqrt(np.prod(shape[:-1])) * (4 if layer.startswith("Dense_") else 1)
    return wave.astype(np.float32)


@functools.cache
def params(name):
    network = NETWORKS[name]
    lazy = {path: LazyTensor(a.shape, a.dtype, lambda a=a: a) for path, a in tensors(name).items()}
    return to_ours(jcm.rules(network), network.shapes(), lazy, source="a formula")


def float64(name, x, t, scaling=None):
    """What the original computes, without rounding."""
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    fir = name == "ve"
    shared = {"blocks": 1, "multipliers": (1, 2), "attention": (8,), "fir": fir, "pyramid": fir}
    level = t[:, None, None, None]
    fed = x if scaling is None else x / np.sqrt(level**2 + 0.25)
    raw = jcm_float64.network(tensors(name), fed, np.log(t) / 4, **shared)
    if scaling is None:
        return raw
    shifted = level - (scaling.sigma_min if isinstance(scaling, BoundaryScaling) else 0)
    return 0.25 / (shifted**2 + 0.25) * x + shifted * 0.5 / np.sqrt(level**2 + 0.25) * raw


def noisy():
    golden = np.load(GOLDEN)
    t = jnp.asarray(golden["t"])
    return golden, jnp.asarray(golden["X"]), t


@pytest.mark.parametrize("name", NETWORKS)
def test_raw_output(name):
    golden, x, t = noisy()
    ours = jax.jit(NETWORKS[name].predict)(params(name), x, EDM_TIME * jnp.log(t))
    assert relative(ours, golden[f"{name}_raw"]) < BOUND


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrapper", SCALINGS)
def test_denoiser_and_consistency_function(name, wrapper):
    golden, x, t = noisy()
    ours = jax.jit(ConsistencyFunction(NETWORKS[name], SCALINGS[wrapper]))(params(name), per_image(t) * x, t)
    assert relative(ours, golden[f"{name}_{wrapper}"]) < BOUND


@pytest.mark.parametrize("name", NETWORKS)
def test_derivative_along_the_trajectory(name):
    golden, x, t = noisy()
    function = ConsistencyFunction(NETWORKS[name], SCALINGS["distiller"])
    wave = jnp.cos(0.03 * jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    f = functools.partial(function, params(name))
    _, ours = jax.jit(lambda x, t, dx, dt: jax.jvp(f, (x, t), (dx, dt)))(
        per_image(t) * x, t, per_image(t) * wave, -jnp.ones(3)
    )
    assert relative(ours, golden[f"{name}_distiller_jvp"]) < BOUND


def test_filters():
    golden = np.load(GOLDEN)
    x = jnp.asarray(golden["fir_x"])
    assert relative(fir_upsample(x), golden["upsample_2d"]) < 1e-6
    assert relative(fir_downsample(x), golden["downsample_2d"]) < 1e-6
    layer = SmoothedConvolution(features=3, by="fir")
    kernel = {"kernel": jnp.asarray(golden["fir_w"]), "bias": jnp.zeros(3)}
    assert relative(layer.apply({"params": kernel}, x), golden["conv_downsample_2d"]) < 1e-6


def test_time_grid():
    np.testing.assert_allclose(KarrasGrid(18).sigma(np.arange(18)), np.load(GOLDEN)["t_grid_18"], rtol=1e-12)
