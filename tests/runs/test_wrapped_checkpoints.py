"""Checkpoints as training programs write them: prefixes, dictionaries, objects next to the tensors."""

import argparse
import collections
import contextlib
import datetime
import io
import pathlib
import re
import sys
import types
import zipfile
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import BUNDLED
from cm_jax.cli import main_convert, main_sample
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.edm_writing import write_state_dict
from cm_jax.conversion.pickles import is_plain_class
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.torch_files import TensorUnpickler, as_torch
from cm_jax.conversion.unet_format import DIFFUSERS, OPENAI
from cm_jax.conversion.unwrap import unwrap
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.types import leaves
from tests.runs.test_commands import failed, succeeded
from tests.support import EMOJI, SMALL, assert_bitwise_equal, random_params
from tools.fuzz import payloads

HINTS = CheckpointHints(head_dim=16, preconditioning="consistency", num_levels=18, image_size=16)
TOLD = ("--head-dim", 16, "--preconditioning", "consistency", "--num-levels", 18, "--image-size", 16)
SONG = SongUNet(
    image_size=8,
    base_channels=8,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_factors=(),
    label_embedding="linear",
)
PARAMS = random_params(SMALL)


def tensors_of(params, format=OPENAI):
    return {name: as_torch(np.array(array)) for name, array in to_source(format.rules(SMALL), params).items()}


MODEL, EMA = tensors_of(PARAMS), tensors_of(random_params(SMALL, 1))
DIFFUSERS_MODEL = tensors_of(PARAMS, DIFFUSERS)
EDM_PARAMS = random_params(SONG)
EDM_MODEL = {
    name: as_torch(np.array(array))
    for name, array in write_state_dict(ModelConfig(SONG, EDMPreconditioning(time_factor=0.25)), EDM_PARAMS).items()
}
NAMINGS = {
    "openai": (MODEL, PARAMS, HINTS),
    "diffusers": (DIFFUSERS_MODEL, PARAMS, HINTS),
    "edm": (EDM_MODEL, EDM_PARAMS, CheckpointHints(preconditioning="edm")),
}


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert_bitwise_equal(*({name: np.asarray(leaf) for name, leaf in leaves(tree)} for tree in (found, expected)))


# Prefixes


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("module.", ".pt"),
        ("_orig_mod.module.", ".pth"),
        ("model.", ".bin"),
        ("unet.", ".safetensors"),
        ("ema.", ".safetensors"),
        ("model.ema_model.", ".pt"),
    ],
)
def test_prefixes_of_wrappers_are_removed(tmp_path, naming, prefix, suffix):
    tensors, params, hints = NAMINGS[naming]
    source = read(save(tmp_path / f"x{suffix}", prefixed(prefix, tensors)), hints)
    assert_same(source.params, params)
    assert any(f"Removed the prefix '{prefix}" in note for note in source.notes)


def test_files_without_wrappers_need_no_notes(tmp_path):
    assert read(save(tmp_path / "x.pt", MODEL), HINTS).notes == ()


def test_a_prefix_that_some_tensors_lack_is_refused(tmp_path):
    tensors = prefixed("module.", MODEL) | {"label_emb.weight": MODEL["label_emb.weight"]}
    del tensors["module.label_emb.weight"]
    with pytest.raises(InputError, match=r"Expected the prefix 'module\.' .* missing in label_emb\.weight"):
        read(save(tmp_path / "x.pt", tensors), HINTS)


def test_other_tensors_next_to_a_wrapped_network_are_left_out(tmp_path):
    """AveragedModel of PyTorch counts its updates; loss functions have their own networks."""
    others = {"n_averaged": torch.tensor(5), "loss.vgg.features.0.weight": torch.zeros(2, 2)}
    source = read(save(tmp_path / "x.safetensors", prefixed("module.", MODEL) | others), HINTS)
    assert_same(source.params, PARAMS)
    assert any("n_averaged" in note and "loss.vgg.features.0.weight" in note for note in source.notes)


def test_extra_tensors_inside_of_a_prefix_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"not part of the network: decay \[1\]"):
        read(save(tmp_path / "x.pt", prefixed("ema.", MODEL | {"decay": torch.zeros(1)})), HINTS)


# Dictionaries


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ({"model": MODEL, "step": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "model"),
        ({"state_dict": prefixed("model.", MODEL), "epoch": 1, "pytorch-lightning_version": "2.0"}, "state_dict"),
        ({"ema": {"module": MODEL, "decay": 0.999}, "step": 4}, "ema.module"),
        ({"state": {"model": {"net": prefixed("module.", MODEL)}}}, "state.model.net"),
    ],
    ids=["model", "lightning", "nested", "deep"],
)
def test_the_only_network_of_a_file_is_read(tmp_path, content, label):
    source = read(save(tmp_path / "x.pt", content), HINTS)
    assert_same(source.params, PARAMS)
    assert f"Read the network {label!r} of the file." in source.notes


def test_what_is_not_read_is_listed(tmp_path):
    assert (
        read(save(tmp_path / "a.pt", {"model": MODEL, "step": 3, "args": 1}), HINTS).notes[-1]
        == "Not read: step, args."
    )
    assert read(save(tmp_path / "b.pt", {**MODEL, "step": 3}), HINTS).notes == ("Not read: step.",)


TWO = {
    "dictionary": (".pt", {"model": MODEL, "ema": EMA, "step": 3}),
    "lightning": (".ckpt", {"state_dict": prefixed("model.", MODEL) | prefixed("ema.module.", EMA)}),
    "one state dict": (".safetensors", prefixed("model.", MODEL) | prefixed("ema.", EMA)),
    "ema_pytorch": (".pt", prefixed("online_model.", MODEL) | prefixed("ema.", EMA) | {"initted": torch.tensor(True)}),
    "shadow parameters": (
        ".pth",
        {"model": prefixed("module.", MODEL), "ema": {"decay": 0.99, "shadow_params": list(EMA.values())}},
    ),
}


@pytest.mark.parametrize("kind", TWO)
def test_one_of_several_networks_is_chosen_by_its_key(tmp_path, capsys, kind):
    suffix, content = TWO[kind]
    path = save(tmp_path / f"x{suffix}", content)
    with pytest.raises(InputError, match=r"holds 2 networks; choose one, e\.g\. --key [\w.]*ema") as refused:
        read(path, HINTS)
    listed = str(refused.value).splitlines()[1:]
    count = f"{len(MODEL)} tensors, {sum(t.numel() for t in MODEL.values()):,} parameters"
    assert len(listed) == 2
    assert all(re.search(rf"{count} \(\S+ \[\d+.*\], ", line) for line in listed)
    assert_same(read(path, CheckpointHints(16, None, "consistency", 18, 16, key="ema")).params, random_params(SMALL, 1))


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": MODEL, "ema": EMA}, "emma", r"no network 'emma'\. Did you mean 'ema'\? Expected one of its keys"),
        ({"ema": {"a": MODEL, "b": EMA}}, "ema", "--key ema matches 2 networks of .*; give the whole key"),
        (MODEL, "ema", "holds one network without a key; leave out --key ema"),
        (
            {"model": {"fc.weight": torch.zeros(2)}, "step": 1},
            None,
            r"Expected one state dict .*\n  model: 1 tensors, 2 ",
        ),
        ({"step": 1}, None, "Expected one state dict .* got a dict with step "),
        ([1, 2], None, "Expected one state dict .* got a list"),
        ({}, None, "Expected one state dict"),
    ],
    ids=["unknown", "ambiguous", "plain", "other network", "no tensors", "list", "empty"],
)
def test_wrong_keys_and_files_without_a_network_are_refused(tmp_path, content, key, message):
    with pytest.raises(InputError, match=message):
        read(save(tmp_path / "x.pt", content), CheckpointHints(16, None, "consistency", 18, 16, key=key))


@pytest.mark.parametrize("name", ["emoji32", "jcm"])
def test_native_and_jcm_checkpoints_have_no_keys(tmp_path, name):
    path = BUNDLED["emoji32"]
    if name == "jcm":
        path = tmp_path / "jcm"
        path.write_bytes(b"\x81\xa1a\x01")
    with pytest.raises(InputError, match="leave out --key ema"):
        read(path, CheckpointHints(key="ema"))


def test_a_file_that_contains_itself(tmp_path):
    """Dictionaries in a circle are searched once."""
    content = {"model": MODEL}
    content |= {f"self{i}": content for i in range(50)}
    assert_same(read(save(tmp_path / "x.pt", content), HINTS).params, PARAMS)


# Objects next to the tensors


class Settings:
    """A class of the training program."""

    def __init__(self, content):
        self.content = content


class Attributes(dict):
    """A dictionary with attributes, as of easydict and Lightning."""


class Words(list):
    """A list of another class, as in omegaconf."""


@pytest.fixture
def foreign():
    """The classes above as if they were of packages that are not installed here; and a network of such a class."""
    modules = {"omegaconf": (Settings,), "easydict": (Attributes, Words), "project": (Network,)}
    for name, classes in modules.items():
        sys.modules[name] = types.ModuleType(name)
        for each in classes:
            setattr(sys.modules[name], each.__name__, each)
            each.__module__ = name
    yield
    for name, classes in modules.items():
        assert name not in sys.modules
        for each in classes:
            each.__module__ = __name__


class Network(torch.nn.Module):
    """A module with the tensors of the network."""

    def __init__(self):
        super().__init__()
        for name, tensor in MODEL.items():
            inner: Any = self
            *parts, leaf = name.split(".")
            for part in parts:
                if part not in inner._modules:
                    inner.add_module(part, torch.nn.Module())
                inner = inner._modules[part]
            inner.register_parameter(leaf, torch.nn.Parameter(tensor))


def forget():
    for name in ("omegaconf", "easydict", "project"):
        del sys.modules[name]


@pytest.mark.parametrize(("protocol", "legacy"), [(2, False), (4, False), (2, True), (4, True)])
def test_objects_next_to_the_tensors_are_inert_data(tmp_path, foreign, protocol, legacy):
    """Neither their classes are imported, nor anything in them called."""
    content = {
        "model": MODEL,
        "args": argparse.Namespace(lr=1e-4, data=pathlib.PurePosixPath("/data")),
        "cfg": Settings(Attributes(a=Words([1, Settings(2)]), b={"size", 3})),
        "rng": (
            np.random.default_rng(0).bit_generator.state,
            np.random.RandomState(0).get_state(),
            torch.get_rng_state(),
        ),
        "scalars": [np.float64(0.5), np.int64(3), np.dtype("float32"), np.arange(3), 2**80, b"bytes", 1j],
        "torch": [torch.float32, torch.device("cpu"), torch.Size([1]), torch.zeros(2, dtype=torch.int64)],
        "other": [datetime.datetime(2024, 1, 1), collections.defaultdict(list), collections.Counter("ab"), frozenset()],
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    forget()
    source = read(path, HINTS)
    assert_same(source.params, PARAMS)
    assert source.notes[-1] == "Not read: args, cfg, rng, scalars, torch and 1 more."


def test_networks_inside_of_objects_are_found(tmp_path, foreign):
    save(tmp_path / "module.pt", Network())
    save(tmp_path / "object.pt", {"ema": Settings({"module": Network()}), "model": Attributes(EMA)})
    forget()
    assert_same(read(tmp_path / "module.pt", HINTS).params, PARAMS)
    chosen = CheckpointHints(16, None, "consistency", 18, 16, key="ema")
    assert_same(read(tmp_path / "object.pt", chosen).params, PARAMS)


DANGEROUS = (
    *("os system", "posix system", "nt system", "builtins exec", "builtins eval", "builtins getattr", "builtins open"),
    *("__builtin__ eval", "commands Popen", "commands getoutput", "subprocess Popen", "subprocess check_output"),
    *("runpy run_path", "importlib import_module", "importlib.abc Loader", "pathlib Path.touch", "argparse FileType"),
    *("functools partial", "operator methodcaller", "numpy load", "numpy memmap", "torch load", "torch.hub load"),
    *("shutil copy", "pickle loads", "zipfile ZipFile", "codecs decode", "project run", "project Trainer.fit", "x.y z"),
    *("pty spawn", "code InteractiveInterpreter", "typing get_type_hints", "builtins type", "collections namedtuple"),
)


@pytest.mark.parametrize("name", DANGEROUS)
def test_everything_but_plain_classes_is_refused(tmp_path, name):
    module, attribute = name.split()
    assert not is_plain_class(module, attribute)
    call = f"c{module}\n{attribute}\n)R".encode()
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}X\x04\x00\x00\x00args" + call + b"s.")
    with pytest.raises(InputError, match=f"a file that runs {module}.{attribute} when it is read"):
        read(tmp_path / "x.pt", HINTS)


def test_classes_of_training_programs_are_plain():
    names = ("__main__ Config", "omegaconf.dictconfig DictConfig", "torch.nn.modules.conv Conv2d", "a.b Outer._Inner")
    assert all(is_plain_class(*name.split()) for name in names)


def test_no_payload_is_read_as_inert_data(tmp_path):
    """All pickles of tools/fuzz that call something are refused; the others are damaged or hold no tensors."""
    refused = 0
    with contextlib.chdir(tmp_path):
        for content in payloads.pickles():
            file = io.BytesIO(content)
            try:
                found = TensorUnpickler(pathlib.Path("x.pt"), file, lambda storage: b"").load()
            except InputError:
                refused += 1
            except Exception:  # damaged; the readers turn it into InputError
                continue
            else:
                with pytest.raises(InputError):
                    unwrap(pathlib.Path("x.pt"), found)
    assert refused > 100
    assert not list(tmp_path.iterdir())


# Commands


def test_commands_print_what_was_chosen_and_removed(tmp_path, capsys):
    path = save(tmp_path / "emoji16_cd.pt", {"ema": prefixed("module.", torch.load(EMOJI)), "step": 5})
    said = succeeded(capsys, main_convert, path, tmp_path / "out")
    lines = ("Read the network 'ema' of the file.", "Removed the prefix 'module.'", "Not read: step.")
    assert all(line in said for line in lines)
    said = succeeded(capsys, main_sample, path, "--key", "ema", "--count", 1, "--output", tmp_path / "s.png")
    assert all(line in said for line in lines)
    assert_same(cm_jax.load(path, key="ema").params, cm_jax.load(EMOJI).params)
    assert "no network 'model'" in failed(capsys, main_sample, path, "--key", "model")
