"""`train.py PRESET --field value ...`: settings that a command line selects. Messages: test_cli_messages.py."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import pytest

from cm_jax.checkpoints.serialization import encode, hints, kinds
from cm_jax.cli import train as command
from cm_jax.cli.parsing import parse_preset
from cm_jax.cli.train import Options
from cm_jax.diffusion.curricula import AdaptiveTargetEMA, AnyTargetEMA, ConstantTargetEMA, Halving
from cm_jax.diffusion.losses import Absolute, PseudoHuber, Squared
from cm_jax.diffusion.noise_distributions import LogNormal
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import AnyPreconditioning, ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.objectives import AnyDistance, AnyObjective, ConsistencyTraining, Denoising, EasyConsistencyTuning, Resized
from tests.support import run


@dataclasses.dataclass(frozen=True)
class Bundled:
    """Images that come along."""

    flip: bool = True
    """Every second image is mirrored."""


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images in a folder."""

    path: str
    """The folder."""
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class Exponential:
    beta: float = 0.999


@dataclasses.dataclass(frozen=True)
class Power:
    width: float = 0.05


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Constant after a warm-up."""

    peak: float = 1e-4
    """The highest rate."""
    warm_up: int = 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """RAdam."""

    learning_rate: LearningRate = LearningRate()
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run computes from."""

    data: Bundled | ImageFolder = Bundled()
    """The images."""
    network: ADMUNet | SongUNet = SongUNet()
    preconditioning: AnyPreconditioning = ConsistencyPreconditioning()
    objective: AnyObjective = ConsistencyTraining()
    """What is minimized."""
    optimizer: Optimizer = Optimizer()
    target: AnyTargetEMA | None = None
    schedule: KarrasSchedule = KarrasSchedule()
    average: Exponential | Power = Exponential(0.9999)
    rates: tuple[float, ...] = (0.9, 0.99)
    batch_size: int = 64
    """Images in a batch, over all devices."""
    clip: float | None = 1.0
    flip: bool = True
    parallelism: Literal["auto", "pmap", "mesh"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"A batch has at least one image, got {self.batch_size}.")


def tiny():
    """A small run,
    in a minute.

    It reaches an FID of 300.
    """
    return TrainConfig(target=ConstantTargetEMA(0.3), objective=ConsistencyTraining(distance=PseudoHuber(0.5)))


PRESETS = {"tiny-ct": tiny, "plain": TrainConfig()}


def settings(line):
    """What a line gives."""
    return parse_preset(PRESETS, Options(), "train.py", line.split())[1]


def changed(**fields):
    return dataclasses.replace(tiny(), **fields)


def test_a_preset_alone_is_itself():
    assert settings("tiny-ct") == tiny()
    assert settings("plain") == TrainConfig()
    assert parse_preset(PRESETS, Options(), "train.py", ["plain"]) == ("plain", TrainConfig(), Options())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--network.base-channels 64", {"network": SongUNet(base_channels=64)}),
        ("--network.base-channels=64", {"network": SongUNet(base_channels=64)}),
        ("--optimizer.learning-rate.peak 2e-4", {"optimizer": Optimizer(LearningRate(2e-4))}),
        ("--optimizer.learning_rate.warm_up 10", {"optimizer": Optimizer(LearningRate(warm_up=10))}),
        ("--optimizer.betas 0.5 0.75", {"optimizer": Optimizer(betas=(0.5, 0.75))}),
        ("--objective.distance.scale -0.0", {"objective": ConsistencyTraining(distance=PseudoHuber(0.0))}),
        ("--target.decay 0.25 --batch-size 8", {"target": ConstantTargetEMA(0.25), "batch_size": 8}),
        ("--no-flip", {"flip": False}),
        ("--no-flip --flip", {"flip": True}),
        ("--data.no-flip", {"data": Bundled(flip=False)}),
        ("--clip none", {"clip": None}),
        ("--clip 2", {"clip": 2.0}),
        ("--rates 0.5", {"rates": (0.5,)}),
        ("--rates", {"rates": ()}),
        ("--parallelism mesh", {"parallelism": "mesh"}),
        ("--network.classes 10 --network.channel-mult 1 2", {"network": SongUNet(classes=10, channel_mult=(1, 2))}),
        # parts
        ("--target none", {"target": None}),
        ("--target AdaptiveTargetEMA", {"target": AdaptiveTargetEMA()}),
        ("--target adaptive-target-ema --target.start 0.5", {"target": AdaptiveTargetEMA(0.5)}),
        ("--target.start 0.5 --target=adaptive_target_ema", {"target": AdaptiveTargetEMA(0.5)}),
        ("--target none --target ConstantTargetEMA", {"target": ConstantTargetEMA()}),
        ("--target constanttargetema", {"target": ConstantTargetEMA(0.3)}),
        ("--objective.distance squared", {"objective": ConsistencyTraining(distance=Squared())}),
        ("--objective.distance pseudo-huber", {"objective": ConsistencyTraining(distance=PseudoHuber(0.5))}),
        (
            "--objective.distance.distance.scale 0.1 --objective.distance.size 8 --objective.distance resized "
            "--objective.distance.distance PSEUDO_HUBER",
            {"objective": ConsistencyTraining(distance=Resized(PseudoHuber(0.1), 8))},
        ),
        (
            "--objective.distance absolute --objective denoising --objective.noise-distribution.mean -0.8",
            {"objective": Denoising(noise_distribution=LogNormal(mean=-0.8), distance=Absolute())},
        ),
        ("--objective EasyConsistencyTuning", {"objective": EasyConsistencyTuning()}),
        ("--objective.curriculum halving", {"objective": dataclasses.replace(tiny().objective, curriculum=Halving())}),
        ("--network admunet", {"network": ADMUNet()}),
        ("--preconditioning edm --preconditioning.sigma-data 1", {"preconditioning": EDMPreconditioning(1.0)}),
        ("--data image-folder --data.path a/b", {"data": ImageFolder("a/b")}),
        ("--data.path a/b --data ImageFolder --data.flip", {"data": ImageFolder("a/b", flip=True)}),
        ("--average.beta 0.5", {"average": Exponential(0.5)}),
        ("--average power --average.width 0.1", {"average": Power(0.1)}),
        ("--average.width 0.1 --average pow", {"average": Power(0.1)}),
        ("--average exponential", {"average": Exponential(0.9999)}),
    ],
)  # fmt: skip
def test_words_change_settings(line, expected):
    assert settings(f"tiny-ct {line}") == changed(**expected)


@pytest.mark.parametrize("kind", kinds(AnyObjective).values(), ids=lambda kind: kind.__name__)
def test_every_objective_and_every_distance_can_be_asked_for(kind):
    assert settings(f"plain --objective {kind.__name__}").objective == kind()
    if "distance" in hints(kind):
        for name, distance in kinds(AnyDistance).items():
            words = f"plain --objective {kind.__name__} --objective.distance {name}"
            own = kind().distance
            expected = own if isinstance(own, distance) else distance()
            assert settings(words).objective == kind(distance=expected)


def words_for(part, above=""):
    """Every plain field of an encoded part, as the command line spells it."""
    for name, value in part.items():
        flag = f"{above}{name}".replace("_", "-")
        if isinstance(value, dict):
            yield from (f"--{flag}", value["kind"], *words_for(value, f"{flag}."))
        elif isinstance(value, bool):
            yield "--" + (flag if value else f"{above}no-{name}".replace("_", "-"))
        elif name != "kind":
            yield from (f"--{flag}", *map(str, value if isinstance(value, list) else [value]))


def test_any_settings_can_be_spelt_out():
    """From one preset to quite another, all by words."""
    wanted = TrainConfig(
        data=ImageFolder("x", flip=True),
        network=ADMUNet(base_channels=32, head_dim=32, classes=None, rematerialize=True),
        objective=EasyConsistencyTuning(distance=Resized(Resized(PseudoHuber(1e-30), 3))),
        target=AdaptiveTargetEMA(over="levels"),
        average=Power(0.1),
        clip=None,
        flip=False,
        rates=(1e-9, 3.0),
    )
    single = {
        "--optimizer",
        "--optimizer.learning-rate",
        "--schedule",
        "--objective.noise-distribution",
        "--objective.gap",
    }
    words = list(words_for(encode(wanted)))
    kept = [word for at, word in enumerate(words) if word not in single and words[at - 1] not in single]
    assert parse_preset(PRESETS, Options(), "train.py", ["tiny-ct", *kept])[1] == wanted


def test_train_command_and_dry_run(monkeypatch, capsys):
    trained, joined = [], []

    def initialize(*given):
        assert not jax.config.jax_enable_preemption_service  # which takes SIGTERM away from the process
        joined.append(given)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(command, "PRESETS", {"plain": TrainConfig})
    monkeypatch.setattr(command, "inheriting", lambda settings, words: settings)
    monkeypatch.setattr(command, "train", lambda settings, folder, say, **flags: trained.append((settings, folder)))
    monkeypatch.setattr(command, "dry_run", lambda settings, preset: [f"seed {settings.seed}, not {preset.seed}"])
    cache = ["--compilation-cache", "off"]
    command.main("train.py", ["plain", *cache])
    command.main("train.py", ["plain", "--run", "elsewhere", "--seed", "3", *cache])
    assert trained == [(TrainConfig(), Path("runs/plain")), (TrainConfig(seed=3), Path("elsewhere"))]
    command.main("train.py", ["plain", "--dry-run", "--seed", "4", *cache])
    assert capsys.readouterr().out == "seed 4, not 0\n"
    assert len(trained) == 2
    assert not joined
    several = ["--coordinator", "a.b:123", "--processes", "4", "--process", "3"]
    command.main("train.py", ["plain", *several, *cache])
    assert joined == [("a.b:123", 4, 3)]


@pytest.mark.parametrize("name", command.PRESETS)
def test_every_preset_is_what_its_name_alone_gives(name):
    assert parse_preset(command.PRESETS, Options(), "train.py", [name])[1] == command.PRESETS[name]()


def test_parsing_leaves_the_devices_alone():
    """Processes that train together join before JAX looks at its devices."""
    script = """
from tests.runs.test_train_cli_parsing import *
settings("tiny-ct --network admunet --objective meanflow")
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
