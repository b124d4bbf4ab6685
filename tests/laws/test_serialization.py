"""Settings as JSON: there and back, older files, damaged ones, and what differs between two."""

import contextlib
import dataclasses
import importlib
import inspect
import json
import pkgutil
import typing
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cm_jax
from cm_jax.checkpoints.former_format import renamed, restated
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.serialization import (
    decode,
    differences,
    encode,
    from_text,
    hints,
    kinds,
    may_be_none,
    to_text,
)
from cm_jax.data import ImageFolder, NpzData
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, AnyTargetEMA, ConstantTargetEMA
from cm_jax.diffusion.losses import PseudoHuber, Squared
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.objectives import AnyDistance, AnyObjective, ConsistencyTraining, Resized


@dataclasses.dataclass(frozen=True)
class Exponential:
    beta: float = 0.999


@dataclasses.dataclass(frozen=True)
class Power:
    width: float = 0.05


@dataclasses.dataclass(frozen=True)
class Unlisted(Power):
    """A subclass that the annotation does not name."""


@dataclasses.dataclass(frozen=True)
class Run:
    """As settings of training will be."""

    path: str
    network: ADMUNet | SongUNet = SongUNet()
    objective: AnyObjective = ConsistencyTraining()
    target: AnyTargetEMA | None = None
    average: Exponential | Power = Exponential()
    rates: tuple[float, ...] = (0.9, 0.99)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    flip: bool = True
    order: Literal["up", "down"] = "up"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError("A seed is not negative.")


NO_SETTINGS = {"Models", "Published", "ConsistencyFunction", "TrainingStep", "Evaluator", "Churn", "Heun", "DPM"}
"""Frozen and plain, but made of functions and arrays, or with an infinite limit by default, which no file holds."""


def package():
    """The settings of the package: frozen dataclasses that a file can hold."""
    for found in pkgutil.walk_packages(cm_jax.__path__, "cm_jax."):
        if {"cli", "conversion", "published", "assets"} & set(found.name.split(".")):
            continue
        for name, kind in vars(importlib.import_module(found.name)).items():
            own = isinstance(kind, type) and kind.__module__ == found.name and name not in NO_SETTINGS
            public = own and not name.startswith("_") and not inspect.isabstract(kind)
            if not public or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
                continue
            if "kind" not in hints(kind) and all(map(storable, hints(kind).values())):
                yield kind


def storable(hint):
    """Whether a file can hold a field of this type."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not ...]
    if kinds(hint) or hint in (int, float, bool, str, type(None)) or typing.get_origin(hint) is Literal:
        return True
    return bool(arguments) and all(map(storable, arguments))


SETTINGS = [*package(), Run]


def values(hint):
    """What a field of this type may hold; not all of it suits its class."""
    if kinds(hint):
        choices = [instances(kind) for kind in kinds(hint).values()]
        return st.one_of(*([st.none()] if may_be_none(hint) else []), *choices)
    numbers = [0.0, 1e-8, 0.1, 0.25, 0.5, 0.9, 1, 2.0, 1e6]
    plain = {
        bool: st.booleans(),
        str: st.text(max_size=5),
        int: st.sampled_from([0, 1, 2, 4, 32, 64, 1000, 2**53 - 1]) | st.integers(-(2**53) + 1, 2**53 - 1),
        float: st.sampled_from(numbers) | st.floats(-1e29, 1e29),
        tuple[int, ...]: st.lists(st.integers(1, 8), max_size=3).map(tuple),
        tuple[str, ...]: st.lists(st.text(max_size=3), max_size=3).map(tuple),
        tuple[float, ...]: st.lists(st.sampled_from([1, 2, 0.5, 4.0]), max_size=3).map(tuple),
        tuple[float, float]: st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
        tuple[tuple[int, ...], ...]: st.sampled_from([(), ((1, 0),)]),
    }
    if hint in plain:
        return plain[hint]
    if may_be_none(hint):
        return st.none() | values(next(choice for choice in hint.__args__ if choice is not type(None)))
    if typing.get_origin(hint) is tuple:
        return st.lists(values(hint.__args__[0]), max_size=3).map(tuple)
    return st.sampled_from(hint.__args__)


@st.composite
def instances(draw, kind):
    """Settings of a kind: the defaults, some of them replaced by what the class accepts."""
    required = {
        field.name: draw(values(hints(kind)[field.name]))
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
    }
    made = kind(**required)
    for name, hint in hints(kind).items():
        if draw(st.integers(0, 2)) == 0:
            try:
                changed = dataclasses.replace(made, **{name: draw(values(hint))})
                made = changed if encode(changed) else made
            except InputError:
                continue
    return made


pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype does, to pick an item
few = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
@few
@given(st.data())
def test_there_and_back(kind, data):
    one, other = data.draw(instances(kind)), data.draw(instances(kind))
    text = json.dumps(encode(one), allow_nan=False)
    back = decode(json.loads(text), kind)
    assert back == one
    assert type(back) is type(one)
    assert json.dumps(encode(back)) == text
    assert (not differences(encode(one), encode(other))) == (one == other)
    fields = json.loads(text)
    fields.pop("kind")
    assert from_text(to_text(one, 3), kind, 3, "a file", "settings") == one


def different(kind, name):
    """The default settings of a kind, and the same with another value of one field that the class accepts."""
    given = {
        ModelConfig: (SongUNet(), EDMPreconditioning()),
        Run: ("x",),
        ImageFolder: ("x",),
        NpzData: ("x",),
    }
    default = kind(*given.get(kind, ()))
    old, hint = getattr(default, name), hints(kind)[name]
    candidates = [
        None,
        0.25,
        16,
        64,
        0.3,
        3,
        7,
        True,
        False,
        "other",
        (1,),
        (1, 2),
        (2, 2, 3, 4),
        (0.1, 0.2),
        ((22, 0),),
    ]
    candidates += list(getattr(hint, "__args__", ()))
    if kinds(hint):
        candidates = [None, *(choice(*given.get(choice, ())) for choice in kinds(hint).values())]
        candidates += [different(type(old), next(iter(hints(type(old)))))[1]] if old and hints(type(old)) else []
    for value in candidates:
        try:
            new = decode(encode(dataclasses.replace(default, **{name: value})), kind)
        except (InputError, TypeError):
            continue
        if new != default:
            return default, new
    return None


BOUND_TO_OTHERS = {
    ("ADMUNet", "head_dim"),
    ("ADMUNet", "heads"),
    ("ModelConfig", "class_names"),
    ("EvalConfig", "metrics"),
    ("PeriodicEvaluation", "metrics"),
}
"""Fields that cannot change alone, or not to any text: one of the first two is set, names need classes."""


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_a_change_of_any_field_is_told(kind):
    for name in hints(kind):
        pair = different(kind, name)
        if pair is None:
            assert (kind.__name__, name) in BOUND_TO_OTHERS
            continue
        lines = differences(*map(encode, pair))
        assert lines
        assert all(line.startswith((f"{name}: ", f"{name}.", f"{name}[")) and line.endswith(" now") for line in lines)
        assert not differences(encode(pair[1]), encode(pair[1]))


def test_every_choice_is_read():
    for base in (AnyObjective, AnyDistance, AnyTargetEMA, AnyIndexDistribution, ADMUNet | SongUNet):
        assert kinds(base)
        for name, kind in kinds(base).items():
            assert decode({"kind": name}, base) == kind()


def test_choices_are_those_of_the_annotation():
    assert list(kinds(hints(Run)["average"])) == ["Exponential", "Power"]
    assert list(kinds(AnyTargetEMA | None)) == ["ConstantTargetEMA", "AdaptiveTargetEMA"]
    assert list(kinds(hints(Resized)["distance"])) == list(kinds(AnyDistance))
    assert kinds(PseudoHuber) == {"PseudoHuber": PseudoHuber}
    assert not any(map(kinds, (int, str, bool, float | None, tuple[int, ...], Literal["a"])))


def test_differences_in_words():
    old = Run("x", target=AdaptiveTargetEMA(), objective=ConsistencyTraining(distance=Resized(Squared())))
    new = Run(
        "y",
        target=None,
        objective=ConsistencyTraining(distance=Resized(PseudoHuber(), 64)),
        average=Exponential(0.9),
        clip=1.0,
        flip=False,
        rates=(0.9,),
    )
    assert differences(encode(old), encode(new)) == [
        'path: "x" in the folder, "y" now',
        "objective.distance.distance: Squared in the folder, PseudoHuber now",
        "objective.distance.size: 32 in the folder, 64 now",
        "target: AdaptiveTargetEMA in the folder, null now",
        "average.beta: 0.999 in the folder, 0.9 now",
        "rates: [0.9, 0.99] in the folder, [0.9] now",
        "clip: null in the folder, 1.0 now",
        "flip: true in the folder, false now",
    ]
    one, other = encode(Run("x")), encode(Run("x", average=Power()))
    assert differences(one, other) == ["average: Exponential in the folder, Power now"]


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
            + '{"kind": "Resized", "distance": ' * 300
            + "null"
            + "}" * 300
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
