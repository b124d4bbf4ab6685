"""Components of other packages: registration, files that name them, and networks that satisfy the protocol alone."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints import registry
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.serialization import decode, differences, encode, kinds
from cm_jax.cli import _import_modules
from cm_jax.cli.parsing import parse_preset
from cm_jax.cli.train import Options
from cm_jax.data import AnyData, Data
from cm_jax.diffusion.losses import Distance
from cm_jax.diffusion.preconditioning import AnyPreconditioning, ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import AnyNetwork, BaseNetwork
from cm_jax.objectives import AnyDistance, AnyObjective, Denoising, Resized
from cm_jax.samplers import Sampler, sampler_named
from cm_jax.training.config import TrainConfig
from cm_jax.types import Network
from tests.tiny import Tiny


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@dataclasses.dataclass(frozen=True)
class Linear(BaseNetwork):
    image_shape: tuple[int, int, int] = (4, 4, 3)
    classes: int | None = None
    gain: float = 1.0

    def initialize(self, key):
        return {"mix": jax.random.normal(key, (3, 3))}

    def predict(self, params, x, c_noise, labels=None, dropout_keys=None, length=None):
        return self.gain * x @ params["mix"]


@dataclasses.dataclass(frozen=True)
class Mine(Denoising):
    power: int = 2


@dataclasses.dataclass(frozen=True)
class Cosine(Distance):
    def __call__(self, x, y):
        return (x * y).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Half(Sampler):
    def __call__(self, denoiser, levels, noise):
        return noise(0)


@dataclasses.dataclass(frozen=True)
class Circles(Data):
    count: int = 8
    colors: tuple[str, ...] = dataclasses.field(default_factory=lambda: ("red", "blue"))

    def open(self, image_size, *, channels=None):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Wide(EDMPreconditioning):
    """A subclass of a built-in component."""


def test_a_registered_class_is_a_choice_wherever_its_base_class_is():
    for kind in (Linear, Mine, Cosine, Circles, Wide, Tiny):
        assert cm_jax.register(kind) is kind
    assert kinds(AnyNetwork)["Linear"] is Linear
    assert kinds(AnyNetwork)["Tiny"] is Tiny  # without a base class
    assert kinds(AnyObjective)["Mine"] is Mine
    assert kinds(AnyDistance)["Cosine"] is Cosine
    assert kinds(AnyPreconditioning)["Wide"] is Wide
    assert kinds(AnyData)["Circles"] is Circles
    assert not {"Linear", "Mine", "Cosine", "Network", "Objective"} & kinds(AnyData | AnyPreconditioning).keys()
    assert not {"Network", "Objective", "Distance", "Data"} & kinds(AnyNetwork | AnyObjective | AnyData).keys()


def test_settings_with_registered_components_survive_a_file():
    for kind in (Linear, Mine, Cosine, Circles, Wide):
        cm_jax.register(kind)
    config = TrainConfig(Circles(3), Linear(gain=2.0), Wide(), Mine(power=3))
    stored = json.loads(json.dumps(encode(config)))
    assert stored["network"] == {
        "kind": "Linear", "module": __name__, "image_shape": [4, 4, 3], "classes": None, "gain": 2.0,
    }  # fmt: skip
    assert decode(stored, TrainConfig) == config
    assert decode(encode(Resized(Cosine())), AnyDistance) == Resized(Cosine())
    other = encode(dataclasses.replace(config, network=Linear(gain=3.0)))
    assert differences(stored, other) == ["network.gain: 2.0 in the folder, 3.0 now"]
    model = ModelConfig(Linear(), ConsistencyPreconditioning())
    assert ModelConfig.from_json(model.to_json(), "a file") == model


def test_a_default_may_come_from_a_factory():
    cm_jax.register(Circles)
    assert decode({"kind": "Circles", "module": __name__, "count": 3}, AnyData) == Circles(3)
    words = ["plain", "--data", "circles", "--data.count", "3"]
    assert parse_preset({"plain": TrainConfig()}, Options(), "train.py", words)[1].data == Circles(3)


def test_a_class_that_is_not_registered_is_named_with_its_module():
    cm_jax.register(Linear)
    text = ModelConfig(Linear(), ConsistencyPreconditioning()).to_json()
    registry._registered.clear()
    with pytest.raises(InputError, match=rf"a file: unknown network 'Linear', saved from the module {__name__}: impo"):
        ModelConfig.from_json(text, "a file")
    for module in ("os; x", 3, ["os"]):
        with pytest.raises(InputError, match="network"):
            decode({"kind": "Evil", "module": module}, AnyNetwork, "network")
    with pytest.raises(
        InputError, match=r"network is a Linear, and files .*register its class: cm_jax.register\(Linear\)"
    ):
        encode(ModelConfig(Linear(), ConsistencyPreconditioning()))


def test_the_module_of_a_built_in_component_is_an_unknown_field():
    with pytest.raises(InputError, match="no field 'module'"):
        decode({"kind": "Denoising", "module": "os"}, AnyObjective)


def test_a_class_that_is_defined_again_replaces_the_former_one():
    def define(default):
        @cm_jax.register
        @dataclasses.dataclass(frozen=True)
        class Again(Linear):
            gain: float = default

        return Again

    assert define(1.0) is not define(2.0)
    assert decode({"kind": "Again"}, AnyNetwork).gain == 2.0


def named(name, base=Linear, **fields):
    return dataclasses.make_dataclass(
        name, [(field, kind, None) for field, kind in fields.items()], bases=(base,), frozen=True
    )


@dataclasses.dataclass
class Mutable(BaseNetwork):
    image_shape: tuple[int, int, int] = (4, 4, 3)


@pytest.mark.parametrize(("component", "message"), [
    (named("SongUNet"), "SongUNet is the name of a component"),
    (named("Adam", Distance), "cannot be registered before it has __call__"),
    (named("Squared", Cosine), "Squared is the name of a component"),
    (dataclasses.make_dataclass("Loose", [], frozen=True), "Loose is no component.* lacks image_shape, classes"),
    (named("Odd", kind=str), "field 'kind'"),
    (Mutable, "frozen=True"),
    (Linear(), "frozen=True"),
    (3, "frozen=True"),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked_types")
def test_classes_that_cannot_be_registered(component, message):
    with pytest.raises(InputError, match=message):
        cm_jax.register(component)
    assert not registry._registered


def test_the_same_name_in_two_modules():
    cm_jax.register(Linear)
    other = named("Linear")
    other.__module__ = "elsewhere"
    with pytest.raises(InputError, match=f"registered by {__name__} already"):
        cm_jax.register(other)


def test_samplers_by_name():
    cm_jax.register(Half)
    for name in ("Half", "half", "ha-lf"):
        assert sampler_named(name) == Half()
    assert sampler_named("heun") == cm_jax.samplers.SAMPLERS["heun"]
    with pytest.raises(InputError, match=r"vp, ve, Half; got 'halff'. Did you mean 'Half'\?"):
        sampler_named("halff")


def test_a_model_of_an_own_network(tmp_path):
    model = cm_jax.Model(ModelConfig(Linear(), EDMPreconditioning()), Linear().initialize(jax.random.key(0)))
    x = jnp.ones((2, 4, 4, 3))
    assert isinstance(Linear(), Network)
    assert model.sample(0, 2, steps=2).shape == (2, 4, 4, 3)
    with pytest.raises(InputError, match=r"cm_jax.register\(Linear\)"):
        model.save(tmp_path / "refused")
    assert not list(tmp_path.iterdir())
    cm_jax.register(Linear)
    model.save(tmp_path / "saved")
    loaded = cm_jax.load(tmp_path / "saved")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.denoise(x, 2.0), model.denoise(x, 2.0))
    for wrong in (jnp.ones((2, 4, 5, 3)), jnp.ones((2, 4, 4, 1))):
        with pytest.raises(InputError, match="Expected images of shape"):
            model.denoise(wrong, 2.0)
    with pytest.raises(InputError, match="leave them out"):
        model.denoise(x, 2.0, 1)


def test_the_command_line_imports_modules_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text("imported = True\n")
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    words = ["--import", "own_parts", "train", "x", "--import=own_parts", "--seed", "3"]
    assert _import_modules(words) == ["train", "x", "--seed", "3"]
    assert sys.modules["own_parts"].imported
    for words in (["--import", "absent_parts"], ["--import"], ["--import="]):
        with pytest.raises(InputError, match="there is no such module"):
            _import_modules(words)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        _import_modules(["--import", "own_broken"])
    del sys.modules["own_parts"]
