"""Parity with recorded guided runs of EDM2's sampler: autoguidance and unconditional guides, with and without churn."""

import functools
import json

import numpy as np
import pytest

from cm_jax.conversion.edm import read_pickle
from cm_jax.model import Model
from cm_jax.samplers import Churn, Heun
from tests.support import DATA, nhwc

BOUND = 1e-5
FOLDER = DATA / "edm"
RUNS = {
    name: run
    for name, run in json.loads((FOLDER / "samplers.json").read_text()).items()
    if run["sampler"] == "edm2" and run["guide"]
}


@functools.cache
def model(name):
    found = read_pickle(FOLDER / f"{name}.pkl")
    return Model(found.config, found.config.network.prepare(found.params))


@pytest.mark.parametrize("name", RUNS)
def test_guided_samples_match(name):
    """The recorded noise is that of the steps in [S_min, S_max]; here each step has its own."""
    run, options = RUNS[name], RUNS[name]["options"]
    names = {"S_churn": "amount", "S_min": "sigma_min", "S_max": "sigma_max", "S_noise": "noise"}
    churn = Churn(**{names[name]: value for name, value in options.items() if name in names})
    sampler, net, guide = Heun(clip=False, churn=churn), model(run["net"]), model(run["guide"])
    with np.load(FOLDER / f"{name}.npz") as recorded:
        golden = dict(recorded)
    plan = net.plan(sampler=sampler, steps=options["num_steps"])
    later = iter(golden.get("noise", ()))
    churned = (churn.amount and churn.sigma_min <= level <= churn.sigma_max for level in plan.levels[:-1])
    empty = np.zeros_like(golden["latents"])
    noise = nhwc(np.stack([golden["latents"], *(next(later) if each else empty for each in churned)]))
    given = {"guidance": options["guidance"], "guide": guide, "labels": golden["labels"], "noise": noise}
    images = net.sample(0, len(golden["labels"]), sampler=sampler, steps=options["num_steps"], **given)
    np.testing.assert_allclose(images, nhwc(golden["out"]), rtol=0, atol=BOUND * run["size"])
    assert next(later, None) is None


def test_all_guided_runs_are_recorded():
    assert set(RUNS) == {"sampler_edm2_autoguidance", "sampler_edm2_cfg", "sampler_edm2_cfg_churn"}
