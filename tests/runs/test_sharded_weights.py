"""Weights in several files, and folders with several weight files."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion import read
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.types import leaves
from tests.support import SMALL, assert_bitwise_equal, random_params

PARAMS = random_params(SMALL)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline with its weights in one file."""
    path = tmp_path_factory.mktemp("whole") / "mine"
    conversion.write(path, "diffusers", ModelConfig(SMALL, ConsistencyPreconditioning()), PARAMS)
    return path


def shard_name(number, suffix=".safetensors", count=3):
    return f"diffusion_pytorch_model-{number:05}-of-{count:05}{suffix}"


def write_shards(unet, parts, suffix=".safetensors"):
    """Each of `parts` in a shard, and their index."""
    places = {}
    for number, part in enumerate(parts, start=1):
        file = unet / shard_name(number, suffix)
        if suffix == ".safetensors":
            safetensors.torch.save_file(part, file)
        else:
            torch.save(part, file)
        places |= dict.fromkeys(part, file.name)
    index = unet / f"diffusion_pytorch_model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.fixture
def sharded(whole, tmp_path, request):
    """A pipeline with its weights in three shards."""
    path = shutil.copytree(whole, tmp_path / "mine")
    tensors = safetensors.torch.load_file(path / "unet" / WEIGHTS)
    (path / "unet" / WEIGHTS).unlink()
    names = list(tensors)
    parts = [{name: tensors[name] for name in names[first::3]} for first in range(3)]
    write_shards(path / "unet", parts, getattr(request, "param", ".safetensors"))
    return path


def assert_whole(source):
    found, expected = ({name: np.asarray(leaf) for name, leaf in leaves(tree)} for tree in (source.params, PARAMS))
    assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("sharded", [".safetensors", ".bin"], indirect=True)
@pytest.mark.parametrize("given", ["", "unet", "unet/*.index.json", "unet/*-00002-of-*"])
def test_shards_are_read_as_one_network(sharded, given):
    """Given the pipeline, its network, the index or any shard."""
    (path,) = sharded.glob(given) if given else [sharded]
    source = read(path)
    assert_whole(source)
    assert source.config.num_levels == 40


def test_shards_without_an_index_are_read_by_their_numbers(sharded):
    (sharded / "unet" / f"{WEIGHTS}.index.json").unlink()
    assert_whole(read(sharded))
    (sharded / "unet" / shard_name(3)).unlink()
    with pytest.raises(InputError, match=r"needs 3 shards, and 1 are missing .*\n  \S+-00003-of-00003\.safetensors"):
        read(sharded)


def rewrite_map(unet, change):
    index = unet / f"{WEIGHTS}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": change(places)}))


def move(unet, name, *, keep):
    """Move or copy a tensor of the second shard into the first one."""
    first, second = (safetensors.torch.load_file(unet / shard_name(number)) for number in (1, 2))
    first[name] = second[name]
    if not keep:
        del second[name]
    for number, part in ((1, first), (2, second)):
        safetensors.torch.save_file(part, unet / shard_name(number))


BIAS = "conv_in.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda unet: (unet / shard_name(2)).unlink(), rf"1 are missing in .*\n  {shard_name(2)}"),
        (
            lambda unet: move(unet, other(unet), keep=True),
            r"(?s)Expected each tensor in one shard .*00001-of-.*00002-of",
        ),
        (
            lambda unet: move(unet, other(unet), keep=False),
            r"contradicts its shards.*\n  in \S+-00001-\S+, not in \S+-00002",
        ),
        (
            lambda unet: rewrite_map(unet, lambda places: {k: v for k, v in places.items() if k != BIAS}),
            rf"contradicts its shards.*\n  in \S+, but not in the index: {BIAS}",
        ),
        (
            lambda unet: rewrite_map(unet, lambda places: places | {"more": shard_name(1)}),
            r"contradicts its shards.*\n  missing in \S+: more",
        ),
        (
            lambda unet: rewrite_map(unet, lambda places: places | {BIAS: "../../x.safetensors"}),
            "names of files in its",
        ),
        (lambda unet: rewrite_map(unet, lambda places: places | {BIAS: 3}), "expected a weight_map"),
        (lambda unet: rewrite_map(unet, lambda places: {}), "expected a weight_map"),
        (lambda unet: (unet / f"{WEIGHTS}.index.json").write_text("{"), "cannot be read as JSON"),
        (lambda unet: (unet / shard_name(2)).write_bytes(b"12345678"), "not a complete safetensors file"),
    ],
    ids=[
        "missing",
        "doubled",
        "moved",
        "not listed",
        "absent",
        "outside",
        "number",
        "empty",
        "damaged index",
        "damaged",
    ],
)
def test_shards_that_contradict_their_index_are_named(sharded, damage, message):
    damage(sharded / "unet")
    with pytest.raises(InputError, match=message):
        read(sharded)


def other(unet):
    return next(iter(safetensors.torch.load_file(unet / shard_name(2))))


def test_files_of_optimizers_are_not_taken_for_weights(whole, tmp_path):
    """The folder of a checkpoint of accelerate."""
    path = shutil.copytree(whole, tmp_path / "mine")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pth"):
        torch.save({"state": 1}, path / "unet" / name)
    tensors = safetensors.torch.load_file(path / "unet" / WEIGHTS)
    (path / "unet" / WEIGHTS).unlink()
    torch.save(tensors, path / "unet" / "pytorch_model.bin")
    assert_whole(read(path))


def test_variants_are_listed_where_several_may_be_meant(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "mine")
    weights = path / "unet" / WEIGHTS
    for variant in ("fp16", "non_ema"):
        shutil.copy(weights, weights.with_suffix(f".{variant}.safetensors"))
    assert_whole(read(path))
    weights.unlink()
    with pytest.raises(InputError, match=r"Expected one network in .*\.fp16\.safetensors, .*\.non_ema\.safetensors"):
        read(path)
    weights.with_suffix(".fp16.safetensors").unlink()
    assert_whole(read(path))
