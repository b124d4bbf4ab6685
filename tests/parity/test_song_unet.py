"""Parity of NCSN++ and DDPM++ with recorded outputs of OpenAI's JAX code, with weights filled by a formula."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.conversion import jcm
from cm_jax.conversion.rules import from_source, to_source
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import EDM_TIME, KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.io.safetensors import LazyTensor
from cm_jax.networks import SongUNet
from cm_jax.networks.layers import SmoothedConvolution, fir_downsample, fir_upsample
from cm_jax.types import per_image
from tests.parity import jcm_float64
from tests.support import DATA, compiled, random_params, relative

BOUND = 1e-5
GOLDEN = DATA / "jcm" / "golden.npz"
VE = SongUNet(image_size=16, base_channels=32, channel_mult=(1, 2), blocks_per_level=1)
NETWORKS = {
    "ve": VE,
    "vp": SongUNet(**{**vars(VE), "embedding": "positional", "resampling": "plain", "pyramid": False}),
}
WAVE = np.cos(0.03 * np.arange(3 * 16 * 16 * 3)).reshape(3, 16, 16, 3)
"""Tangent of the recorded JVP."""
PRECONDITIONING = {
    "denoiser": EDMPreconditioning(time_factor=EDM_TIME),
    "distiller": ConsistencyPreconditioning(time_factor=EDM_TIME),
}


@functools.cache
def tensors(name):
    """Parameters by OpenAI's names, filled by `formula`."""
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
    return network.prepare(from_source(jcm.rules(network), network.shapes(), lazy, source="a formula"))


def float64_output(name, quantity, weights):
    """Output of OpenAI's network in float64."""
    golden = np.load(GOLDEN)
    x, t = golden["X"].astype(np.float64), golden["t"].astype(np.float64)
    fir = name == "ve"
    shared = {"blocks": 1, "channel_mult": (1, 2), "attention": (8,), "fir": fir, "pyramid": fir}

    def network(x, t):
        return jcm_float64.network(weights, x, np.log(t) / 4, **shared)

    def wrapped(x, t):
        level = t[:, None, None, None]
        shifted = level - (0.002 if quantity.startswith("distiller") else 0)
        raw = network(x / np.sqrt(level**2 + 0.25), t)
        return 0.25 / (shifted**2 + 0.25) * x + shifted * 0.5 / np.sqrt(level**2 + 0.25) * raw

    def ahead(share):
        """The function at a step of `share` t along the tangent (t WAVE, -1)."""
        step = share * t
        return wrapped(t[:, None, None, None] * (x + step[:, None, None, None] * WAVE), t - step)

    if quantity == "raw":
        return network(x, t)
    if quantity != "distiller_jvp":
        return wrapped(t[:, None, None, None] * x, t)
    h = 1e-5
    return (8 * (ahead(h) - ahead(-h)) - (ahead(2 * h) - ahead(-2 * h))) / (12 * h * t[:, None, None, None])


def float32_output(name, quantity):
    """Output of cm_jax in float32."""
    golden, network = np.load(GOLDEN), compiled(NETWORKS[name])
    x, t = jnp.asarray(golden["X"]), jnp.asarray(golden["t"])
    if quantity == "raw":
        return network.predict(params(name), x, EDM_TIME * jnp.log(t))
    f = functools.partial(ConsistencyFunction(network, PRECONDITIONING[quantity.removesuffix("_jvp")]), params(name))
    if quantity != "distiller_jvp":
        return f(per_image(t) * x, t)
    tangent = (per_image(t) * jnp.asarray(WAVE, jnp.float32), -jnp.ones(3))
    return jax.jit(lambda point, tangent: jax.jvp(f, point, tangent)[1])((per_image(t) * x, t), tangent)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("quantity", ["raw", "denoiser", "distiller", "distiller_jvp"])
def test_recorded_outputs(name, quantity, optimized):
    """Compare with float64, because these weights amplify float32 rounding.

    The output must be within BOUND of the float64 output, or within twice the effect of rounding every weight once
    more. Relative differences (ve, vp) of raw, denoiser or distiller, and JVP:

    - cm_jax from the recorded output: 1.5e-5, 2.5e-5; 3.4e-6, 6.3e-6; 1.8e-5, 2.2e-5
    - recorded from the float64 output: 2.0e-5, 1.6e-5; 4.4e-6, 4.3e-6; 3.2e-5, 1.8e-5
    - effect of one rounding of the weights: 1.9e-5, 1.7e-5; 4.1e-6, 9.9e-6; 2.6e-5, 1.7e-5
    """
    golden, rng = np.load(GOLDEN)[f"{name}_{quantity}"], np.random.default_rng(0)
    exact = float64_output(name, quantity, tensors(name))

    def rounded(weights):
        return {path: array * (1 + 2.0**-24 * rng.uniform(-1, 1, array.shape)) for path, array in weights.items()}

    rounding_error = max(relative(float64_output(name, quantity, rounded(tensors(name))), exact) for _ in range(2))
    output, allowed = float32_output(name, quantity), max(BOUND, 2 * rounding_error)
    assert relative(output, exact) < allowed
    assert relative(output, golden) < allowed + relative(golden, exact)


@pytest.mark.parametrize("fir", [True, False], ids=["ncsnpp", "ddpmpp"])
def test_deeper_networks(fir):
    """Three levels with two blocks each and attention. Random weights do not amplify rounding."""
    network = SongUNet(
        image_size=8,
        base_channels=8,
        channel_mult=(1, 2, 1),
        blocks_per_level=2,
        embedding="fourier" if fir else "positional",
        resampling="fir" if fir else "plain",
        pyramid=fir,
    )
    params = random_params(network)
    tensors = to_source(jcm.rules(network), params)
    x, times = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([1.1, -0.4])
    exact = jcm_float64.network(
        tensors,
        np.asarray(x, np.float64),
        np.asarray(times, np.float64),
        blocks=2,
        channel_mult=(1, 2, 1),
        attention=(4,),
        fir=fir,
        pyramid=fir,
    )
    assert relative(jax.jit(network.predict)(params, x, times), exact) < BOUND


def test_filters():
    golden = np.load(GOLDEN)
    x = jnp.asarray(golden["fir_x"])
    assert relative(fir_upsample(x), golden["upsample_2d"]) < 1e-6
    assert relative(fir_downsample(x), golden["downsample_2d"]) < 1e-6
    layer = SmoothedConvolution(features=3, by="fir")
    kernel = {"kernel": jnp.asarray(golden["fir_w"]), "bias": jnp.zeros(3)}
    assert relative(layer.apply({"params": kernel}, x), golden["conv_downsample_2d"]) < 1e-6


def test_time_grid():
    np.testing.assert_allclose(KarrasSchedule().sigma(np.arange(18), 18), np.load(GOLDEN)["t_grid_18"], rtol=1e-12)
