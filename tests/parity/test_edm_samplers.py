"""Parity with recorded runs of the samplers of EDM, EDM2, ECT, TCM and sCM, from the same noise."""

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.preconditioning import IDDPMPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.samplers import Churn, Heun, ScoreSDE, Segments, VPSchedule
from tests.parity.test_edm_family import BOUND, FOLDER, checkpoint
from tests.support import nhwc, relative

RUNS = json.loads((FOLDER / "samplers.json").read_text())
LEFT_OUT = [name for name, run in RUNS.items() if run["guide"]]


@functools.cache
def model(name):
    found = checkpoint(name)
    return Model(found.config, found.config.network.prepare(found.params))


def arguments(run, config) -> dict[str, Any]:
    """The arguments of Model.sample for a recorded run: its options in this project's terms."""
    options = run["options"]
    steps = options.get("num_steps")
    match run["sampler"]:
        case "edm" | "edm2":
            churn = [options[name] for name in ("S_churn", "S_min", "S_max", "S_noise") if name in options]
            return {"sampler": Heun(churn=Churn(*churn)), "steps": steps}
        case "ect" | "ect_imgnet" | "tcm":
            return {"sigmas": (80.0, *options["mid_t"])}
        case "scm_sampler":
            return {"steps": steps}
        case "trigflow_sampler":
            return {"sampler": {1: "euler", 2: "heun"}[options["order"]], "steps": steps}
        case "euler_sampler" if steps:
            return {"sampler": "euler", "steps": steps}
        case "euler_sampler":
            return {"sampler": "euler", "sigmas": options["step_sigmas"][:-1]}
        case "ancestral_sampler":  # its last step leads from the lowest but one of steps + 1 levels to the data
            return {"sampler": "ancestral", "sigmas": config.schedule.descending(steps + 1)[:-1]}
        case "ms_scd_sampler":
            spacing = "log_snr" if "boundary_schedule" in options else "time"
            return {"sampler": Segments(spacing=spacing), "steps": steps}
        case "ablation" if options["discretization"] == options["schedule"]:
            return {"sampler": options["schedule"], "steps": steps}
        case "ablation":  # EDM's levels in VP's time, with betas that reach them
            schedule = VPSchedule.between(config.schedule.sigma_min, config.schedule.sigma_max)
            sampler = ScoreSDE(schedule=schedule, solver=options["solver"])
            return {"sampler": sampler, "sigmas": config.schedule.descending(steps)}
    raise AssertionError(run["sampler"])


@pytest.mark.parametrize("name", [name for name in RUNS if name not in LEFT_OUT])
def test_recorded_samples(name):
    run, sampled = RUNS[name], model(RUNS[name]["net"])
    with np.load(FOLDER / f"{name}.npz") as recorded:
        golden = dict(recorded)
    latents = golden["latents"][None]
    unused = np.zeros_like(latents)  # of the last step, which adds no noise
    noise = nhwc(np.concatenate([latents, golden.get("noise", latents[:0]), unused]))
    options = arguments(run, sampled.config)
    images = sampled.sample(0, len(noise[0]), labels=golden.get("labels"), noise=noise, **options)
    assert relative(images, nhwc(golden["out"])) < BOUND


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("ect_ddpmpp_uncond", 0.821),
        ("ect_edm2_cond", 1.526),
        ("scm_edm2_cond", 0.98238),
        ("scm_ddpmpp_uncond", 0.98238),
    ],
)
def test_two_steps_use_the_tuned_sigmas(name, second):
    levels = model(name).plan(steps=2).levels
    assert levels[:2] == pytest.approx((80.0, second), rel=1e-5)
    assert levels[2] == (0.003 if name == "ect_ddpmpp_uncond" else 0.0)


def test_levels_of_iddpm_are_those_of_the_network_after_churn_too():
    sampled = model("iddpm_adm_cond")
    coefficients = sampled.config.preconditioning
    assert isinstance(coefficients, IDDPMPreconditioning)
    known = coefficients.levels()
    plan = sampled.plan(sampler=Heun(churn=Churn(40)), steps=5)
    assert set(plan.levels) <= set(known.tolist())
    assert isinstance(plan.sampler, Heun)
    assert plan.sampler.preconditioning == coefficients
    x = jnp.zeros((1, 2, 2, 3))
    _, higher = Churn(40)(x, jnp.float32(plan.levels[1]), 5, x, coefficients.round_sigma)
    assert float(higher) in known[known > plan.levels[1]].tolist()


def test_levels_below_the_lowest_of_iddpm_are_refused():
    with pytest.raises(InputError, match=r"0\.00642"):
        model("iddpm_adm_cond").plan(sampler="heun", sigmas=(0.001,))


def test_models_of_this_family_do_not_clip_unless_asked():
    sampled = model("edm_adm_cond")
    assert sampled.plan(sampler="heun", steps=5).sampler.clip is False
    assert sampled.plan(sampler="heun", steps=5, clip=True).sampler.clip is True
    assert sampled.plan(sampler=Heun(clip=True), steps=5).sampler.clip is True
