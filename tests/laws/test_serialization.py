"""Settings as JSON: round trips, the choices of a field, and differences between two settings."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import types
import typing
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cm_jax
from cm_jax.checkpoints.model_config import Latents, ModelConfig
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
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, AnyTargetEMA
from cm_jax.diffusion.losses import PseudoHuber, Squared
from cm_jax.diffusion.noise_distributions import AnyIndexDistribution
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


NO_SETTINGS = {
    *("Models", "Published", "ConsistencyFunction", "GuidedDenoiser", "GuidedStudent", "TrainingStep", "Evaluator"),
    *("Churn", "Heun", "DPM"),
}
"""Frozen and plain, but made of functions and arrays, or with an infinite limit by default, which no file holds."""


def package():
    """The settings of the package: frozen dataclasses that a file can hold."""
    for found in pkgutil.walk_packages(cm_jax.__path__, "cm_jax."):
        if {"cli", "conversion", "demo", "published", "assets"} & set(found.name.split(".")):
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
        tuple[int, int]: st.tuples(st.integers(1, 8), st.integers(1, 8)),
        tuple[tuple[int, ...], ...]: st.sampled_from([(), ((1, 0),)]),
        tuple[tuple[float, ...], ...]: st.sampled_from([(), ((80.0, 1.5),)]),
    }
    if hint in plain:
        return plain[hint]
    if may_be_none(hint):
        return st.none() | st.one_of(*(values(choice) for choice in hint.__args__ if choice is not type(None)))
    if isinstance(hint, types.UnionType):
        return st.one_of(*map(values, hint.__args__))
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
        Latents: ("x", (1.0,), (0.0,)),
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
        ("other",),
        (1,),
        (1, 2),
        (2, 2, 3, 4),
        (0.1, 0.2),
        ((22, 0),),
        ((80.0, 1.5),),
    ]
    parts = getattr(hint, "__args__", ())
    candidates += [*parts, *(value for part in parts for value in getattr(part, "__args__", ()))]
    if kinds(hint):
        candidates = [None, *(choice(*given.get(choice, ())) for choice in kinds(hint).values())]
        candidates += [different(type(old), next(iter(hints(type(old)))))[1]] if old and hints(type(old)) else []
    for value in candidates:
        try:
            new = decode(encode(dataclasses.replace(default, **{name: value})), kind)
        except (InputError, TypeError, AttributeError):  # of another type
            continue
        if new != default:
            return default, new
    return None


BOUND_TO_OTHERS = {
    ("ADMUNet", "head_dim"),
    ("ADMUNet", "heads"),
    ("ModelConfig", "class_names"),
    ("ModelConfig", "latents"),
    *(("EDM2UNet", name) for name in ("augment_dim", "modulation", "output_channels")),
    ("EvalConfig", "metrics"),
    ("PeriodicEvaluation", "metrics"),
    *(("TrainConfig", name) for name in ("augmentation", "label_dropout", "ema_snapshot_every")),
    *(("TrainConfig", f"{place}_{choice}") for place in ("teacher", "init_from") for choice in ("key", "ema")),
}
"""Fields that cannot change alone, or not to any text: one of the first two is set, names need classes, latents need as
many scales as channels, EDM2's network has no other modulation, snapshots need power-function EMAs, and keys and EMAs
need a checkpoint."""


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_a_change_of_any_field_is_told(kind, unchecked_types):
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
