"""Messages and help texts of the command line."""

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Annotated

import jax
import pytest
import tyro

import cm_jax
from cm_jax import cli
from cm_jax.checkpoints.serialization import hints, kinds
from cm_jax.cli import main, main_convert, main_sample, parsing
from cm_jax.cli.convert import Convert
from cm_jax.cli.options import Statistics
from cm_jax.cli.parsing import parse, parse_preset
from cm_jax.cli.running import run as run_command
from cm_jax.cli.running import use_compilation_cache
from cm_jax.cli.train import Options
from cm_jax.errors import InputError
from cm_jax.training.config import TrainConfig
from tests.runs.test_train_cli_parsing import PRESETS


def failed(capsys, command):
    """The error message of a command that must exit with status 2."""
    with pytest.raises(SystemExit) as stopped:
        command()
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert not output.out
    assert "Traceback" not in output.err
    if output.err.startswith("error: "):
        assert output.err.count("\n") == 1
        return output.err
    return " ".join(re.sub("[│╭╮╰╯─]", " ", output.err).split())  # tyro's box


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths(Statistics):
    """Every type of path."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional]
    output: Path
    folder: Path | None = None


def test_the_home_folder_in_paths_is_expanded_where_the_shell_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = "~/a.png b.png --output=~/o.png --folder=~/f --reference-cache=~/r --compilation-cache=~/c"
    args = parse(Paths, "test", line.split())
    assert args.pictures == (tmp_path / "a.png", Path("b.png"))
    assert (args.output, args.folder, args.cache) == tuple(tmp_path / name for name in ("o.png", "f", "r"))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    use_compilation_cache(args.compilation_cache)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Name a preset first: train.py PRESET [--field value ...]. Choose one of tiny-ct, plain."),
        ("--batch-size 4 plain", "Name a preset first"),
        ("tiny", "There is no preset 'tiny'. Did you mean 'tiny-ct'?"),
        ("dragon", "There is no preset 'dragon'. Choose one of tiny-ct, plain."),
        ("plain --network.dorpout 0.1", "There is no option --network.dorpout. Did you mean --network.dropout?"),
        ("plain --netwrok.base-channels=64", "option --netwrok.base-channels. Did you mean --network.base-channels?"),
        ("plain --learning-rate 1", "Did you mean --optimizer.learning-rate.peak?"),
        ("plain --peak 1", "Did you mean --optimizer.learning-rate.peak?"),
        ("plain --wings 1", "There is no option --wings. --help lists the options."),
        ("plain --no-flap", "Did you mean --data.flip or --flip?"),
        ("plain extra", "Unexpected argument 'extra'"),
        ("plain --no-flip 3", "Unexpected argument '3'"),
        ("plain --objective.distance huber", "must be one of Absolute, Squared, PseudoHuber, Resized"),
        ("plain --objective.distance huber", "Did you mean 'PseudoHuber'?"),
        ("plain --objective Distance", "--objective must be one of"),
        ("plain --objective.distance", "Missing value for argument '--objective.distance'"),
        ("plain --target", "Missing value for argument '--target'"),
        ("plain --target none adaptive-target-ema", "Unexpected argument 'adaptive-target-ema'"),
        ("plain --objective none", "--objective must be one of"),
        ("plain --target.decay 1", "--target is none here. It needs --target ConstantTargetEMA."),
        ("plain --objective.distance.scale 1", "--objective.distance is Squared here. It needs --objective.dis"),
        ("tiny-ct --target none --target.decay 1", "--target is none here"),
        ("plain --data ImageFolder", "--data.path STR The folder. (required)"),
        ("plain --batch-size x", "--batch-size: expected a whole number, got 'x'."),
        ("plain --batch-size 1.5", "--batch-size: expected a whole number, got '1.5'."),
        ("plain --batch-size", "Missing value for argument '--batch-size'"),
        ("plain --batch-size 0", "A batch has at least one image, got 0."),
        ("plain --seed 9007199254740992", "seed must be a whole number of less than 2^53, got 9007199254740992."),
        ("plain --clip x", "--clip: expected a number or none, got 'x'."),
        ("plain --clip nan", "clip must be a finite number, got NaN."),
        ("plain --rates 1 x", "--rates: Could not find valid parse for arguments: ['1', 'x']"),
        ("plain --optimizer.betas 0.9", "Missing value for argument '--optimizer.betas'. Expected 2 values."),
        ("plain --parallelism meshh", "--parallelism: expected one of auto, pmap, mesh, got 'meshh'. Did you"),
        ("plain --network.base-channels 31", "network: This network cannot be built"),
        ("plain --target ConstantTargetEMA --target.decay 2", "target: Expected 0 <= decay <= 1, got"),
        ("plain --processes 2", "needs all of --coordinator, --processes and --process."),
        ("plain --coordinator here --processes 2 --process 0", "--coordinator must be HOST:PORT, got 'here'."),
        ("plain --coordinator a:1 --processes 0 --process 0", "--processes must be at least 1, got 0."),
        ("plain --coordinator a:1 --processes 2 --process 2", "--process must lie in [0, 1], got 2."),
        ("plain --distributed auto --coordinator a:1", "--distributed auto finds the other processes: omit --coo"),
        ("plain --dry-rum", "Did you mean --dry-run?"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense(capsys, line, message):
    def words():
        run_command(lambda: parse_preset(PRESETS, Options(), "train.py", line.split()))

    assert message in failed(capsys, words)


def test_no_launcher_is_named_in_one_message(monkeypatch):
    def found_none():
        raise ValueError("coordinator_address should be defined.")  # as JAX does

    monkeypatch.setattr(jax.distributed, "initialize", found_none)
    with pytest.raises(InputError, match=r"^--distributed auto found no launcher .*, or give --coordinator"):
        Options(distributed="auto").connect()


def shown(capsys, command, *words):
    with pytest.raises(SystemExit) as stopped:
        command(list(words))
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_lists_the_presets_and_then_every_field(capsys):
    def ask(words):
        parse_preset(PRESETS, Options(), "train.py", words)

    indented_list = shown(capsys, ask, "--help")
    assert "tiny-ct A small run, in a minute." in indented_list
    assert "plain Everything that a run computes from." in indented_list
    assert "FID" not in indented_list
    told = shown(capsys, ask, "tiny-ct", "--help")
    assert "A small run, in a minute. It reaches an FID of 300." in told
    assert "sets the defaults of the new component" in told
    assert "--data {Bundled,ImageFolder} The images. (default: Bundled)" in told
    assert "--target {ConstantTargetEMA,AdaptiveTargetEMA,none} (default: ConstantTargetEMA)" in told
    assert "--batch-size INT Images in a batch, over all devices. (default: 64)" in told
    assert "--optimizer.learning-rate.peak FLOAT The highest rate. (default: 0.0001)" in told
    assert "--objective.distance.scale FLOAT c / sqrt(d); 0: the norm. (default: 0.5)" in told
    assert "--data.flip, --data.no-flip Every second image is mirrored. (default: True)" in told
    assert "--network.base-channels INT Channels at multiplier 1" in told
    assert "--average {Exponential,Power}" in told
    assert "--run STR Folder of the run." in told
    other = shown(capsys, ask, "tiny-ct", "--data", "image-folder", "--help")
    assert "--data.path STR The folder. (required)" in other
    assert "Every second image" not in other


def components(kind, found):
    """Add a dataclass of this package and those that its fields accept to a set, which is returned."""
    if kind not in found and kind.__module__.startswith("cm_jax."):
        found.add(kind)
        for hint in hints(kind).values():
            for each in kinds(hint).values():
                components(each, found)
    return found


def test_every_option_has_a_description():
    modules = [importlib.import_module(f"cm_jax.cli.{each.name}") for each in pkgutil.iter_modules(cli.__path__)]
    commands = [
        kind
        for module in modules
        for kind in vars(module).values()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == module.__name__
    ]
    assert len(commands) > 15
    missing = [
        f"{kind.__name__}.{name}"
        for kind in {*commands, *components(TrainConfig, set())} - {parsing._Option}
        for name, hint in parsing._shown(kind).items()
        if len(kinds(hint)) != 1 and not parsing._descriptions(kind).get(name)
    ]
    assert not missing


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("convert", "Default: as the account is configured. --license"),
        ("edit colorize", "resized to the model's size. (required)"),
        ("edit colorize", "(native, .pt, .pkl, a diffusers folder, ...)"),
        ("edit", "kinds ─"),
        ("evaluate", "32 for features. --inception"),
        ("tune", "32 for features. --inception"),
        ("train emoji32-ect", "no --network NAME; in Python, False. --network-fields"),
        ("train imagenet64-ect", "no --network NAME; in Python, False. --network-fields"),
        ("train emoji32-ect", "no --data; in Python, False. --batch-size"),
        ("train emoji32-ect", "(default: runs/emoji32-edm)"),
    ],
)
def test_help_shows_each_default_once(capsys, line, expected):
    assert expected in shown(capsys, main, *line.split(), "--help")


@pytest.mark.parametrize(("flags", "private"), [("", None), ("--private", True), ("--no-private", False)])
def test_private_has_three_values(flags, private):
    assert parse(Convert, "convert", f"a b {flags}".split()).private is private


@pytest.mark.parametrize(
    ("door", "line", "message"),
    [
        (main_sample, "--step 3", "There is no option --step. Did you mean --steps?"),
        (main_sample, "--sampler huen", "progdist, segments, vp, ve; got 'huen'. Did you mean 'heun'"),
        (main_sample, "--count x", "--count: expected a whole number or none, got 'x'."),
        (main_sample, "a b", "Unexpected argument 'b'"),
        (main_convert, "", "Missing from python -m convert: SOURCE"),
        (main_convert, "a", "Missing from python -m convert: DESTINATION"),
        (main_convert, "a b --no-private", "--private and --license apply to an upload: add --push OWNER/NAME"),
        (main_convert, "a --too 3", "Missing value for argument 'destination'"),
        (main_convert, "a b --head-with 3", "There is no option --head-with. Did you mean --head-dim?"),
        (main, "", "Name a command first: cm-jax COMMAND [options]. Choose one of sample, "),
        (main, "smaple", "There is no command 'smaple'. Did you mean 'sample'?"),
        (main, "sample --labls 3", "There is no option --labls. Did you mean --labels?"),
    ],
)  # fmt: skip
def test_the_other_commands_speak_alike(capsys, door, line, message):
    assert message in failed(capsys, lambda: door(line.split()))


def test_commands_are_listed(capsys):
    assert "sample Sample images from a consistency model" in shown(capsys, main, "--help")
    assert "Examples: cm-jax sample" in shown(capsys, main, "--help")
    assert "--steps INT Number of sampling steps." in shown(capsys, main, "sample", "--help")
    assert f"cm_jax {cm_jax.__version__}, jax {jax.__version__}, Python" in shown(capsys, main, "--version")
