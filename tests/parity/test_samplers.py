"""Parity of all samplers with OpenAI's code, from the same noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.conversion import CheckpointHints, read
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.samplers import DPM, Ancestral, Churn, Consistency, Euler, Heun, ProgressiveEuler, choose_levels
from cm_jax.samplers.generation import replay
from tests.support import DATA, EMOJI, adm_golden, nhwc

BOUND = 1e-5
RUNS = sorted(path.name for path in (DATA / "openai").glob("sampler_*.npz"))


@pytest.mark.parametrize("name", RUNS)
def test_recorded_samples(name):
    with np.load(DATA / "openai" / name) as recorded:
        golden = dict(recorded)
    kind, steps = name.removesuffix(".npz").rsplit("_", 1)[1], int(golden["steps"])
    churn = Churn(*(float(golden[key]) for key in ("s_churn", "s_tmin", "s_tmax", "s_noise") if key in golden))
    sampler = {
        "onestep": Consistency(),
        "multistep": Consistency(),
        "heun": Heun(churn=churn),
        "dpm": DPM(churn=churn),
        "euler": Euler(),
        "ancestral": Ancestral(),
        "progdist": ProgressiveEuler(),
    }[kind]
    options = {"indices": golden["ts"].tolist()} if "ts" in golden else {"steps": 1 if kind == "onestep" else steps}
    levels = choose_levels(sampler, KarrasSchedule(), steps, **options)
    network, params, _ = adm_golden(str(golden["model"]).removeprefix("adm_"))
    preconditioning = ConsistencyPreconditioning() if golden["consistency_parameterisation"] else EDMPreconditioning()
    noise = nhwc(golden["noise"])
    assert sampler.num_noise_samples(len(levels) - 1) <= len(noise)
    images = replay(ConsistencyFunction(network, preconditioning), sampler, params, levels, noise, golden["y"])
    np.testing.assert_allclose(images, nhwc(golden["out"]), atol=BOUND)


def test_all_samplers_are_recorded():
    kinds = {name.removesuffix(".npz").rsplit("_", 1)[1] for name in RUNS}
    assert kinds == {"onestep", "multistep", "heun", "dpm", "euler", "ancestral", "progdist"}
    assert len(RUNS) == 10


@pytest.mark.parametrize(
    ("run", "options"),
    [("cd_onestep", {"steps": 1}), ("cd_multistep", {"indices": (0, 8, 17)}), ("cd_multistep", {"timesteps": (8, 0)})],
)
def test_samples_of_the_bundled_model(run, options, optimized):
    golden = np.load(DATA / "emoji16" / "runs.npz")
    images = load("emoji16_cd").sample(0, 18, labels=golden["y"], noise=nhwc(golden[f"{run}_noise"]), **options)
    np.testing.assert_allclose(images, nhwc(golden[f"{run}_out"]), atol=BOUND)


def test_samples_of_the_teacher(optimized):
    golden = np.load(DATA / "emoji16" / "runs.npz")
    source = read(DATA / "emoji16" / "emoji16_edm.pt", CheckpointHints(32, None, "edm", 18, 16))
    model = Model(source.config, source.config.network.prepare(source.params))
    images = model.sample(0, 18, labels=golden["y"], noise=nhwc(golden["edm_heun_noise"]), steps=18)
    np.testing.assert_allclose(images, nhwc(golden["edm_heun_out"]), atol=BOUND)


def test_tuned_timesteps_match_the_recorded_run():
    assert load(EMOJI).plan(steps=2) == load(EMOJI).plan(indices=(0, 8, 17))


def _pattern(shape, a, m):
    return (2 * (a * np.arange(np.prod(shape)) % m / m - 0.5)).reshape(shape)


CHURN = Churn(5, 0.05, 50, 1.003)


@pytest.mark.parametrize(
    ("key", "sampler", "options"),
    [
        ("heun", Heun(clip=False), {"steps": 10}),
        ("heun_churn", Heun(clip=False, churn=CHURN), {"steps": 10}),
        ("euler", Euler(clip=False), {"steps": 10}),
        ("dpm", DPM(clip=False), {"steps": 10}),
        ("dpm_churn", DPM(clip=False, churn=CHURN), {"steps": 10}),
        ("ancestral", Ancestral(clip=False), {"steps": 10}),
        ("progdist", ProgressiveEuler(clip=False), {"steps": 9}),
        ("onestep", Consistency(clip=False), {"steps": 1}),
        ("multistep_0_4_9", Consistency(clip=False), {"indices": (0, 4, 9)}),
        ("multistep_0_3_6_9", Consistency(clip=False), {"indices": (0, 3, 6, 9)}),
    ],
)
def test_toy_denoiser_without_clipping(key, sampler, options):
    """Denoiser tanh(x) / (1 + sigma), with initial noise from _pattern and 0.5 for all later noise."""
    golden = np.load(DATA / "openai" / "openai_formula_weights.npz")
    start = jnp.asarray(nhwc(_pattern((1, 3, 4, 4), 37, 97)), jnp.float32)
    levels = jnp.asarray(choose_levels(sampler, KarrasSchedule(), 10, **options), jnp.float32)

    def denoiser(x, sigma):
        return jnp.tanh(x) / (1 + sigma[:, None, None, None])

    images = sampler(denoiser, levels, lambda index: jnp.where(index == 0, start, 0.5))
    np.testing.assert_allclose(images, nhwc(golden[f"toy_{key}"]), atol=BOUND)
