"""The noise schedule, sigma_data and N(k) are each stated once in a run, and former configs may not contradict."""

import dataclasses

import pytest

from cm_jax.checkpoints.former_format import restated
from cm_jax.checkpoints.serialization import encode
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, Constant, Progressive
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.objectives import ConsistencyTraining
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.setup import make_step


def paths(encoded, name, above=""):
    """The places of a field in encoded settings, unless its value is null."""
    if isinstance(encoded, list):
        return [path for item in encoded for path in paths(item, name, above)]
    if not isinstance(encoded, dict):
        return []
    found = [f"{above}{key}" for key, value in encoded.items() if key == name and value is not None]
    return found + [path for key, value in encoded.items() for path in paths(value, name, f"{above}{key}.")]


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_states_each_quantity_once(name):
    config = PRESETS[name]()
    encoded = encode(config)
    for quantity in ("sigma_min", "sigma_max", "rho"):
        assert paths(encoded, quantity) == [f"schedule.{quantity}"]
    assert paths(encoded, "sigma_data") in ([], ["preconditioning.sigma_data"])
    assert len(paths(encoded, "curriculum")) <= 1
    assert len(paths(encoded, "num_levels")) <= 1
    assert config.function.schedule is config.schedule


def test_num_levels_of_a_run_with_a_curriculum_is_refused():
    with pytest.raises(InputError, match="201 levels by its curriculum: give --num-levels none"):
        TrainConfig(objective=ConsistencyTraining(), num_levels=201)


def test_the_target_follows_the_curriculum_of_the_objective():
    config = TrainConfig(objective=ConsistencyTraining(Progressive(2, 9, steps=10)), target_ema=AdaptiveTargetEMA(0.5))
    make_step(config, None)
    with pytest.raises(InputError, match="follows a Progressive curriculum"):
        make_step(dataclasses.replace(config, objective=ConsistencyTraining(Constant(10))), None)


GRID = {"kind": "KarrasGrid", "levels": 201, "sigma_min": 0.01, "sigma_max": 80.0, "rho": 7.0}
CURVE = {"kind": "KarrasCurve", "sigma_min": 0.01, "sigma_max": 80.0, "rho": 7.0}
FORMER = {
    "grid": GRID,
    "preconditioning": {"kind": "ConsistencyPreconditioning", "sigma_min": 0.01, "sigma_data": 0.4},
    "objective": {
        "kind": "ConsistencyTraining",
        "curve": CURVE,
        "curriculum": {"kind": "Progressive"},
        "weighting": {"kind": "Karras", "sigma_data": 0.4},
    },
    "target": {"kind": "AdaptiveTargetEMA", "curriculum": {"kind": "Progressive", "steps": 800_000}},
}


def test_former_configs_that_agree_are_restated():
    present = restated(FORMER)
    assert present == {
        "schedule": {"kind": "KarrasSchedule", "sigma_min": 0.01, "sigma_max": 80.0, "rho": 7.0},
        "preconditioning": {"kind": "ConsistencyPreconditioning", "sigma_data": 0.4},
        "objective": {
            "kind": "ConsistencyTraining",
            "curriculum": {"kind": "Progressive"},
            "weighting": {"kind": "Karras"},
        },
        "target": {"kind": "AdaptiveTargetEMA"},
    }
    assert restated(present) == present
    assert FORMER["grid"] is GRID
    assert set(GRID) == {"kind", "levels", "sigma_min", "sigma_max", "rho"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": GRID | {"sigma_min": 0.002}}, "sigma_min: 0.002 in grid, 0.01 in preconditioning"),
        ({"grid": GRID | {"rho": 3.0}}, "rho: 3.0 in grid, 7.0 in objective.curve"),
        ({"grid": GRID | {"levels": 40}}, "number of levels: 201 in objective.curriculum, 40 in grid"),
        ({"preconditioning": {"kind": "EDMPreconditioning"}}, "sigma_data: 0.5 in preconditioning, 0.4 in objective"),
        ({"objective": {"kind": "Denoising"}}, "the curriculum: .* in target.curriculum, None in objective"),
        ({"grid": GRID | {"sigma": 1}}, "grid must be an object of kind KarrasGrid with levels, sigma_min"),
        ({"grid": 3}, "grid must be an object of kind KarrasGrid"),
    ],
)
def test_former_configs_that_contradict_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        restated(FORMER | changes)


@pytest.mark.parametrize(("levels", "num_levels"), [(40, None), (18, 18)])
def test_former_num_levels_of_a_run_without_a_curriculum(levels, num_levels):
    present = restated({"grid": {"kind": "KarrasGrid", "levels": levels}, "objective": {"kind": "Denoising"}})
    assert present.get("num_levels") == num_levels
    assert restated({"grid": {"kind": "KarrasGrid", "levels": levels}})["num_levels"] == levels  # of a model
    assert KarrasSchedule(**{k: v for k, v in present["schedule"].items() if k != "kind"}) == KarrasSchedule()
