"""Settings read from files: older versions, values that do not fit, and damaged files."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_jax.checkpoints.former_format import renamed, restated
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.serialization import decode, encode, from_text
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, ConstantTargetEMA
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from tests.laws.test_serialization import Run, Unlisted

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype does, to pick an item


def test_fields_that_an_older_file_lacks_take_their_defaults():
    assert decode({"kind": "Run", "path": "x"}, Run) == Run("x")
    older = {"kind": "Run", "path": "x", "target": {"kind": "AdaptiveTargetEMA"}}
    assert decode(older, Run) == Run("x", target=AdaptiveTargetEMA())


OLD_CONFIG = """{
  "format": 1,
  "network": {
    "kind": "ADMUNet",
    "image_size": 16,
    "image_channels": 3,
    "base_channels": 32,
    "channel_mult": [
      1,
      2
    ],
    "blocks_per_level": 1,
    "attention_factors": [
      2
    ],
    "head_dim": 16,
    "heads": null,
    "classes": 2,
    "modulation": "scale_shift",
    "resampling": "residual",
    "dropout": 0.0,
    "precision": "float32",
    "attention": "auto",
    "rematerialize": false
  },
  "scaling": {
    "kind": "ConsistencyPreconditioning",
    "sigma_data": 0.5,
    "time_factor": 250.0,
    "sigma_min": 0.002
  },
  "grid": {
    "kind": "KarrasGrid",
    "levels": 18,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "rho": 7.0
  },
  "class_names": [
    "a",
    "b"
  ],
  "tuned_timesteps": [
    [
      8,
      0
    ]
  ]
}
"""
"""As version 0.1.0 wrote it."""


def test_configs_of_format_1_stay_readable():
    config = ModelConfig.from_json(OLD_CONFIG, "a test")
    assert config.network == ADMUNet(16, 3, 32, (1, 2), 1, (2,), 16, classes=2)
    assert config.tuned_timesteps == ((8, 0),)
    assert (config.schedule, config.num_levels) == (KarrasSchedule(), 18)
    written = json.loads(config.to_json())
    for name, value in restated(renamed(json.loads(OLD_CONFIG))).items():
        assert written[name] == (written[name] | value if isinstance(value, dict) else value)  # later ones add fields


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "it must be an object whose kind is Run"),
        ([], "it must be an object whose kind is Run"),
        ({"kind": "Runn"}, "got 'Runn'. Did you mean 'Run'?"),
        ({"kind": "os.system"}, "whose kind is Run, got 'os.system'."),
        ({"kind": ["Run"]}, "whose kind is Run."),
        ({"kind": "Run"}, "path must be a text, got null"),
    ],
)
def test_what_is_no_run(value, message):
    with pytest.raises(InputError) as refused:
        decode(value, Run)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sed": 1}, "it has no field 'sed'. Did you mean 'seed'?"),
        ({"wings": 1}, "it has no field 'wings'. Its fields are path, network"),
        ({"seed": 1.0}, "seed must be a whole number, got 1.0"),
        ({"seed": 2**53}, "seed must be a whole number of less than 2^53"),
        ({"seed": True}, "seed must be a whole number, got true"),
        ({"seed": -1}, "A seed is not negative"),
        ({"order": "dwon"}, "order must be one of up, down, got \"dwon\". Did you mean 'down'"),
        ({"flip": 1}, "flip must be true or false"),
        ({"rates": 0.1}, "rates must be a list, got 0.1"),
        ({"rates": [0.1, None]}, r"rates[1] must be a finite number, got null"),
        ({"betas": [0.1]}, "betas must be a list of 2, got [0.1]"),
        ({"clip": float("inf")}, "clip must be a finite number"),
        ({"average": {}}, "average must be an object whose kind is Exponential or Power."),
        ({"average": {"kind": "Unlisted"}}, "kind is Exponential or Power, got 'Unlisted'"),
        ({"average": {"kind": "Power", "with": 1}}, "average has no field 'with'. Did"),
        ({"target": 3}, "target must be an object whose kind is ConstantTargetEMA or AdaptiveTargetEMA, or null"),
        ({"target": {"kind": "ConstantTargetEMA", "decay": 2}}, "target: Expected 0 <= decay <= 1, got"),
        ({"network": None}, "network must be an object whose kind is ADMUNet or SongUNet"),
        (
            {"objective": {"kind": "ConsistencyTraining", "distance": {"kind": "Squaredd"}}},
            "objective.distance must be an object whose kind is Absolute or Squared or PseudoHuber or Resized",
        ),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(InputError) as refused:
        decode({"kind": "Run", "path": "x", **fields}, Run)
    assert message in str(refused.value)


def test_what_could_not_be_read_is_not_written():
    for bad in (float("nan"), float("inf"), 1e31):
        with pytest.raises(InputError, match=r"^target\.decay must be a finite number"):
            encode(Run("x", target=unchecked(ConstantTargetEMA(), decay=bad)))
    with pytest.raises(InputError, match=r"^seed must be a whole number of less than"):
        encode(Run("x", seed=2**53))
    with pytest.raises(InputError, match=r"^average is a Unlisted, and files can hold Exponential or Power there"):
        encode(Run("x", average=Unlisted()))


def unchecked(part, **fields):
    for name, value in fields.items():
        object.__setattr__(part, name, value)
    return part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.json is not settings"),
        ("[" * 100_000, "x.json is not settings"),
        ("[1]", "it has no format"),
        ("{}", "it has no format"),
        ('{"format": 1}', "has format 1; this version reads format 2: it is damaged"),
        ('{"format": 3}', "upgrade cm_jax"),
        ('{"format": 2.0}', "it is damaged"),
        ('{"format": 2, "path": 1}', "x.json: path must be a text, got 1"),
        (
            '{"format": 2, "path": "x", "objective": {"kind": "Denoising", "distance": '
            + '{"kind": "Resized", "distance": ' * 600
            + "null"
            + "}" * 600
            + "}}",
            "too deep",
        ),
    ],
    ids=range(9),
)
def test_files_that_hold_no_settings(text, message):
    with pytest.raises(InputError) as refused:
        from_text(text, Run, 2, "x.json", "settings")
    assert message in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_settings_damaged_anywhere_are_read_or_refused(data):
    """Any value in place of any value: never another error than InputError."""
    fields = encode(Run("x", target=AdaptiveTargetEMA()))
    part = fields
    while True:
        holder, key = part, data.draw(st.sampled_from(sorted(part)))
        part = part[key]
        if not isinstance(part, dict) or data.draw(st.booleans()):
            break
    holder[key] = data.draw(JSON | st.sampled_from([2**30, -1, 0, 1e29, 1e-29]))
    with contextlib.suppress(InputError):
        assert isinstance(decode(fields, Run), Run)
